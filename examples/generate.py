"""Attach a checkpoint to a loaded model and generate with it; `compress.py` makes the checkpoint."""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import orthokv

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="demo/demo-llama-3m")
parser.add_argument("--checkpoint", default="out/examples/small", help="a folder or a hub id")
parser.add_argument("--prompt", default="The house stood at the end of a long road, and")
given = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(given.model)
tokenizer = AutoTokenizer.from_pretrained(given.model)
inputs = tokenizer(given.prompt, return_tensors="pt")

for compressed in (False, True):
    if compressed:
        orthokv.attach(model, given.checkpoint)
    cache = DynamicCache(config=model.config)
    tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=40, do_sample=False)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
    print(f"the cache holds {orthokv.cache_bytes(cache)} bytes for {cache.get_seq_length()} tokens\n")
