"""Conversations as token ids, and which of them the assistant wrote. Knows templates and ids.

A conversation is a list of messages, [{"role": "user", "content": "..."}, ...].
"""

import numpy as np

ASSISTANT = "assistant"


class Conversations:
    """Encodes conversations by a Vocabulary and a ChatTemplate.

    `ends` are the ids any of which ends a turn. Control tokens that stand in a message's content
    are text; without any, the ids are those of the rendered text.
    """

    def __init__(self, vocabulary, template, ends):
        self.vocabulary = vocabulary
        self.template = template
        self.ends = ends

    def encode(self, messages, add_generation_prompt=False):
        """The ids (N,) of a conversation, as a model is given them.

        Raises: ValueError if the template or the tokenizer refuses them.
        """
        text = self.template.render(self._shadowed(messages), add_generation_prompt)
        ids, _, _ = self.vocabulary.encode_written(text)
        return ids

    def encode_answers(self, messages):
        """(ids (N,), is_answer (N,) bool) of a conversation: which tokens the assistant wrote.

        They are those that the template marks by `{% generation %}`. In a template without marks
        they are found by rendering: a turn of the assistant is what is there after it, and not
        before it; what the template writes behind the token that ends the turn is not part of it.
        The ids are those of `encode`, unless a token reaches over the beginning of such a part: the
        two sides are then encoded apart, as they are when the assistant is asked to write it.
        Raises: ValueError as `encode`; and if the start of the conversation alone is rendered
        otherwise than in the whole.
        """
        shadowed = self._shadowed(messages)
        text, spans = self.template.render_marked(shadowed)
        marked = spans is not None
        if not marked:
            spans = self._turns(shadowed, text)
        ids, starts, stops = self._encoded(text, [start for start, _ in spans])
        is_answer = np.zeros(len(ids), bool)
        for start, stop in spans:
            # A token of no characters belongs to those after it.
            inside = np.flatnonzero((starts < stop) & (np.maximum(stops, starts + 1) > start))
            if not marked:
                inside = self._to_the_end(ids, inside)
            is_answer[inside] = True
        return ids, is_answer

    def _encoded(self, text, beginnings):
        """(ids, starts, stops) of `text`, of which no token reaches over one of `beginnings`."""
        ids, starts, stops = self.vocabulary.encode_written(text)
        cuts = [at for at in beginnings if ((starts < at) & (at < stops)).any()]
        if not cuts:
            return ids, starts, stops
        pieces = []
        for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
            part = text[start:stop]
            ids, starts, stops = self.vocabulary.encode_written(part, continues=start > 0)
            pieces.append((ids, start + starts, start + stops))
        return tuple(map(np.concatenate, zip(*pieces, strict=True)))

    def _shadowed(self, messages):
        """`messages`, with what was typed out of the way of the template's control tokens."""
        shadowed = []
        for message in messages:
            role = message["role"]
            if self.vocabulary.holds_control(role):
                raise ValueError(f"the role {role!r} holds a control token")
            content = self.vocabulary.shadowed(message["content"])
            shadowed.append({"role": role, "content": content})
        return shadowed

    def _turns(self, messages, text):
        """[(start, stop)] of the assistant's turns in `text`, the rendered `messages`."""
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            before = self.template.render(messages[:i], add_generation_prompt=True)
            after = self.template.render(messages[: i + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"{self.template.where} renders the first {i + 1} of these messages alone "
                    "otherwise than among all of them, so the assistant's part cannot be told: put "
                    "{% generation %} and {% endgeneration %} around it in the template, or let "
                    "each conversation end with its first answer"
                )
            spans.append((len(before), len(after)))
        return spans

    def _to_the_end(self, ids, inside):
        """The indices `inside` up to the last of an end token, if one is among them."""
        ending = np.flatnonzero(np.isin(ids[inside], self.ends))
        if len(ending):
            return inside[: ending[-1] + 1]
        return inside


def turn_end(vocabulary, template):
    """The id of the control token that `template` ends an assistant's turn with, or None."""
    answer = "an answer of words"
    messages = [
        {"role": "user", "content": "a question"},
        {"role": ASSISTANT, "content": answer},
    ]
    try:
        text = template.render(messages)
    except ValueError:
        # It wants other messages.
        return None
    _, found, rest = text.rpartition(answer)
    control = vocabulary.pattern.search(rest)
    if not found or control is None:
        return None
    return vocabulary.controls.get(control[0])
