"""Print what the service needs without the library: extras of pyproject.toml, and typer for the command line.

python requirements.py EXTRA...
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
lines = [one for one in project["dependencies"] if one.startswith(("typer", "rich"))]
for extra in sys.argv[1:]:
    lines += project["optional-dependencies"][extra]
sys.stdout.write("\n".join(lines) + "\n")
