"""The makers need what the tests do not, torch or an older minilora: pytest's doctests must not import them."""

collect_ignore = ["make.py", "make_llama.py", "v0_1/make.py"]
