"""A text as it grows, token by token, up to where it ends. Knows a tokenizer, no model.

What is shown cannot be taken back: a character whose bytes have not all come is held back, and so
is what may be the beginning of a text that ends the whole.
"""


class TextStream:
    """Token ids of one text in, and out the pieces of text that are certain.

    `tokenizer` is a disk.tokenizer.Tokenizer. One of its `ends`, or one of the texts `stops`, ends
    the text before it; a stop may begin and end within tokens. `after` are the ids of a text that
    is continued, none for a text of its own. `text` is all that came out, `ended` whether it has
    ended so. Of the `tokens` ids that went in, end tokens aside, the
    tokenizer has no text for `unknown`: a model may have more of them than its vocabulary needs.
    """

    def __init__(self, tokenizer, stops=(), after=()):
        self._ends = tokenizer.ends
        self._n_known = tokenizer.vocab_size
        self._decoder = tokenizer.stream(after)
        self._stops = [stop for stop in stops if stop]
        # Decoded, and not certain yet.
        self._held = ""
        self.text = ""
        self.ended = False
        self.tokens = 0
        self.unknown = 0

    def push(self, token):
        """The text that has become certain with the next token id; "" once the text has ended."""
        if self.ended:
            return ""
        if token in self._ends:
            piece = self.finish()
            self.ended = True
            return piece
        self.tokens += 1
        if token >= self._n_known:
            self.unknown += 1
            return ""
        return self._take(self._decoder.push(token))

    def finish(self):
        """What was held back, when no token follows: a broken character becomes U+FFFD."""
        if self.ended:
            return ""
        piece = self._take(self._decoder.finish())
        if self.ended:
            return piece
        rest = self._held
        self._held = ""
        self.text += rest
        return piece + rest

    def _take(self, new):
        """Add decoded text; the part of it that is certain, up to a stop."""
        text = self._held + new
        places = [text.find(stop) for stop in self._stops if stop in text]
        if places:
            self.ended = True
            certain = min(places)
        else:
            certain = len(text) - self._longest_beginning(text)
        self._held = text[certain:]
        self.text += text[:certain]
        return text[:certain]

    def _longest_beginning(self, text):
        """The length of the longest end of `text` with which a stop begins."""
        longest = max(map(len, self._stops), default=1) - 1
        for n in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-n:]) for stop in self._stops):
                return n
        return 0
