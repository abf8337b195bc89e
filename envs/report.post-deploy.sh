#!/usr/bin/env bash
# Run in the finished environment, in the folder of the Snakefile: the scripts of the workflow import the library.
python -m pip install --no-deps .
