"""The maker needs torch, transformers and PEFT, which the tests do not: pytest's doctests must not import it."""

collect_ignore = ["make.py"]
