# A worker. torch brings its own CUDA libraries; the machine brings the driver. Runs without a GPU, too.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# gcc and the headers are for kernels that Triton compiles where they run.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /srv

COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY orthokv orthokv
COPY app app
COPY workers workers
COPY migrations migrations
COPY clients/python clients/python
RUN pip install -c constraints.txt ".[worker,otel]" ./clients/python

RUN useradd --uid 10001 --create-home orthokv && install -d -m 700 -o orthokv /data
USER 10001
WORKDIR /data
ENV ORTHOKV_DATA_DIR=/data HF_HOME=/data/huggingface
VOLUME /data
# Fails when no worker holds its end of the pipe.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python3", "-c", "import os; os.close(os.open('/data/wake', os.O_WRONLY | os.O_NONBLOCK))"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["orthokv"]
CMD ["worker"]
