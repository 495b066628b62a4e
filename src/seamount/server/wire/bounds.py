"""How much JSON may hold, told from its text, before anything is made of it.

Called by `door.body` for bodies, and by the schemas for JSON that stands in a text. A few bytes of JSON become a
hundred times as many in Python, made in one go: nobody else has a turn meanwhile.
"""

from __future__ import annotations

from pydantic_core import PydanticCustomError

# Objects, lists and names in all. A conversation of 4096 messages has some 30,000; an answer that is sent back with the
# log-probabilities of 2000 tokens, and of 20 others beside each, 220,000.
MAX_PARTS = 2**18
MAX_VALUES = 2**20 + 2**18  # commas: as many token ids as one request may hold, and everything else
MAX_NAMES = 8192  # of one object; the largest schema that is taken has fewer
TOO_COMPLEX = f"more than {MAX_PARTS} objects, lists and names in all, or more than {MAX_VALUES} values"
_STRUCTURE = b'"[{:,'
_OTHERS = bytes(set(range(256)) - set(_STRUCTURE))


def is_too_complex(text: str) -> bool:
    """Say whether JSON text holds more than `MAX_PARTS` or `MAX_VALUES`. Of what is no JSON it says anything."""
    num_parts = text.count("[") + text.count("{") + text.count(":")
    if num_parts <= MAX_PARTS and text.count(",") <= MAX_VALUES:
        return False
    # Without escapes every second stretch between quotes is a string's inside, which does not count.
    bare = text.encode(errors="surrogatepass").replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _OTHERS)
    outside = b"".join(bare.split(b'"')[::2])
    num_commas = outside.count(b",")
    return len(outside) - num_commas > MAX_PARTS or num_commas > MAX_VALUES


def simple_json(text: str) -> str:
    """Refuse text that, read as JSON, holds too much."""
    if is_too_complex(text):
        raise PydanticCustomError("json_too_complex", "must hold no {much}", {"much": TOO_COMPLEX})
    return text
