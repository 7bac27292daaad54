#!/bin/bash
# XGrammar drops everything that stands beside anyOf, allOf, $ref or enum in a JSON schema: with "one of these two fields is
# required" any JSON value at all fits, and nothing is said.
#
# Version:      xgrammar 0.2.9 (vLLM and SGLang can use it, among others), jsonschema 4.26.0, CPython 3.11, CPU.
# Likely guess: what XGrammar cannot express it refuses or warns of, as it does for a pattern with maxLength and for oneOf:
#               an answer under a schema has the schema's properties.
# Behaviour:    of {"type": "object", "properties": ..., "required": ..., "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}
#               only the anyOf is kept, and {"required": ["a"]} without properties of its own is taken for any value. An
#               allOf of one does the same; beside a $ref an enum, and beside an enum a minimum, are passed over.
# Matters:      a tool's schema that asks for at least one of two arguments lets the model call it with a list, a text or
#               other names, as if no grammar were there, while tests with a plain schema pass. Put the properties into each
#               branch of the anyOf.
# Seen:         {"a": "x"}, {}, {"c": 1}, [1], "x" accepted, by jsonschema: plain none of 5, by jsonschema none; anyOf 5, none;
#               allOf 5, none; properties in each branch 0, none; $ref with enum: 1 of 1, none; enum with minimum: 1 of 1, none
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "xgrammar==0.2.9" "torch==2.13.0" "numpy==1.26.4" \
    "jsonschema==4.26.0"
"$scratch/venv/bin/python" - <<'PYTHON'
import json

import jsonschema
from xgrammar import Grammar
from xgrammar.testing import _is_grammar_accept_string

fields = {"properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "additionalProperties": False}
plain = {"type": "object", **fields, "required": ["a"]}
some = [{"required": ["a"]}, {"required": ["b"]}]
wrong = ['{"a": "x"}', "{}", '{"c": 1}', "[1]", '"x"']
text = {"city": {"type": "string"}}
cases = [
    ("plain", plain, wrong, 0),
    ("anyOf", {"type": "object", **fields, "anyOf": some}, wrong, 5),
    ("allOf of one", {"type": "object", **fields, "allOf": some[:1]}, wrong, 5),
    ("properties in each branch", {"anyOf": [{"type": "object", **fields, **one} for one in some]}, wrong, 0),
    ("$ref beside enum", {"$ref": "#/$defs/city", "enum": ["Beijing"], "$defs": text}, ['"Paris"'], 1),
    ("enum beside minimum", {"type": "integer", "minimum": 2, "enum": [1, 3]}, ["1"], 1),
]
holds = _is_grammar_accept_string(Grammar.from_json_schema(json.dumps(plain)), '{"a": 1}')
for name, schema, answers, expected in cases:
    grammar = Grammar.from_json_schema(json.dumps(schema))
    accepted = sum(_is_grammar_accept_string(grammar, answer) for answer in answers)
    valid = sum(jsonschema.Draft202012Validator(schema).is_valid(json.loads(answer)) for answer in answers)
    print(f"{name}: of {len(answers)} answers XGrammar accepts {accepted}, jsonschema {valid}")
    holds = holds and (accepted, valid) == (expected, 0)
raise SystemExit(0 if holds else 1)
PYTHON
