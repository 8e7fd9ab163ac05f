"""Commands of the package: parse, call and print. `keye NAME` and `scripts/NAME.py` run them."""
