"""Rotary positions in the fields of a config.json, as transformers 4 and 5 say them.

Knows fields and no model. What the numbers must be is checked where they are used.
Source: transformers' modeling_rope_utils.py.
"""

from .family import check_fields

# {kind of rotary positions: the numbers that it needs}
_ROPE_FACTORS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
}  # fmt: skip
# What transformers takes for an absent rope_theta.
_ROPE_THETA = 10000.0


def read_rotary(fields):
    """(rope_theta, rope_scaling) from the fields of transformers 5 or of 4.

    5 has all in rope_parameters. 4 has rope_theta, and in rope_scaling what is not the default.
    Raises: ValueError that names the field: contradictory, incomplete, or of a kind that is not
    implemented.
    """
    new = fields.get("rope_parameters")
    old = fields.get("rope_scaling")
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{name} must be an object with fields, or null, got {value!r}")
    theta = _one_theta(fields, new or {}, old or {})
    scalings = [_read_scaling(fields, rope) for rope in (new, old) if rope]
    # transformers 5 takes the old field if there are both.
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise ValueError(
            f"rope_parameters={new!r} and rope_scaling={old!r} contradict each other; keep the one "
            "that the model was trained with"
        )
    return theta, scalings[0] if scalings else None


def _one_theta(fields, *ropes):
    """The base of the rotary angles, which may be given in several places."""
    given = [rope["rope_theta"] for rope in (fields, *ropes) if rope.get("rope_theta") is not None]
    if any(theta != given[0] for theta in given):
        raise ValueError(f"rope_theta is given as {' and as '.join(map(repr, given))}; keep one")
    return given[0] if given else _ROPE_THETA


def _read_scaling(fields, rope):
    """What is done to the rotary angles: None, or a rope_scaling of a LlamaConfig."""
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"rotary positions that differ by layer are not implemented: {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_FACTORS:
        raise ValueError(
            f"rope_type={kind!r} changes what the model computes; only "
            f"{' or '.join(map(repr, _ROPE_FACTORS))} is implemented"
        )
    check_fields(rope, {"partial_rotary_factor": (1, None)})
    for name in _ROPE_FACTORS[kind]:
        if rope.get(name) is None:
            raise ValueError(f"rope_type={kind!r} needs {name}, and {rope!r} has none")
    if kind == "default":
        return None
    scaling = {"rope_type": kind, **{name: rope[name] for name in _ROPE_FACTORS[kind]}}
    # transformers 5 prefers the one outside.
    name = "original_max_position_embeddings"
    if name in scaling and fields.get(name, scaling[name]) != scaling[name]:
        raise ValueError(f"{name} is given as {scaling[name]!r} and as {fields[name]!r}; keep one")
    return scaling


def written_rotary(config):
    """The fields for the rope_theta and the rope_scaling of a LlamaConfig."""
    scaling = config.rope_scaling or {"rope_type": "default"}
    return {
        # transformers 4 reads these two, 5 the third.
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "rope_parameters": {**scaling, "rope_theta": config.rope_theta},
    }
