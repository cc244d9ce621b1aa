"""The text of token ids that come one at a time. Knows of a tokenizer that it decodes."""

# What stands for bytes that are no character, or not yet a whole one.
REPLACEMENT = "\ufffd"


class TokenStream:
    """Text, as soon as it is certain: `push(id)` returns what is new, `finish()` what is left.

    A character may be made of several tokens: nothing of it comes before the last of them. `after`
    are the ids of a text that is continued, none for a text of its own: many decoders take the
    space off its first word. Together the texts are what `decode` of all ids has after that of
    `after`.
    """

    def __init__(self, decode, after=()):
        self.decode = decode
        # The ids that were returned last, which a decoder may need to see before the next ones, and
        # those that have not been returned yet.
        self.last = [int(token) for token in after]
        self.waiting = []

    def push(self, token):
        """The text that is certain once the id `token` has come; often it is empty."""
        self.waiting.append(int(token))
        text = self._text()
        if text.endswith(REPLACEMENT):
            return ""
        return self._returned(text)

    def finish(self):
        """The text that is left: a character that was begun and not ended is a replacement."""
        return self._returned(self._text())

    def _text(self):
        return self.decode([*self.last, *self.waiting])[len(self.decode(self.last)) :]

    def _returned(self, text):
        if text:
            self.last = self.waiting
            self.waiting = []
        return text
