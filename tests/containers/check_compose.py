"""Holds a compose file to the schema of compose: check_compose.py FILE."""

import json
import sys
from importlib.metadata import files
from pathlib import Path

import jsonschema
import yaml

(schema,) = (one for one in files("docker-compose") or () if one.name == "compose_spec.json")
document = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
del document["name"]  # newer than that schema
jsonschema.validate(document, json.loads(schema.read_text()))
print(f"INFO {sys.argv[1]} passed against the schema of compose, 2021")
