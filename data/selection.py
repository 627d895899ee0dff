"""Filter and order training documents as system B's data path does; never validation documents.

Filter "quality": 50 words or more, a type/token ratio of 0.25 or more, fewer than 3 marks of boilerplate.
Order "difficulty", easy first: 0.3 * mean word length / 10 + 0.4 * type/token ratio + 0.3 * words a
sentence / 30 (openai/parameter-golf pull request 1666). There the first documents in this order, the
easy ones, were all that it trained on.
"""

import argparse
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from common import at_least_one

MIN_WORDS = 50
MIN_TYPE_RATIO = 0.25
MAX_MARKS = 2
BOILERPLATE = (
    "all rights reserved",
    "click here",
    "cookie policy",
    "enable javascript",
    "lorem ipsum",
    "privacy policy",
    "sign up",
    "subscribe",
    "terms of service",
    "terms of use",
)
SENTENCE_END = re.compile(r"[.!?]+(?:\s|$)")


def type_ratio(words: list[str]) -> float:
    """Divide the different words, whatever their case, by all of them."""
    return len({word.lower() for word in words}) / len(words)


def is_good(text: str) -> bool:
    """Tell whether a document passes the quality filter."""
    words, lower = text.split(), text.lower()
    marks = sum(mark in lower for mark in BOILERPLATE)
    return len(words) >= MIN_WORDS and type_ratio(words) >= MIN_TYPE_RATIO and marks <= MAX_MARKS


def difficulty(text: str) -> float:
    """Rate a document; 0 for one without words."""
    words = text.split()
    if not words:
        return 0.0
    sentences = max(1, len(SENTENCE_END.findall(text)))
    mean_len = sum(map(len, words)) / len(words)
    return 0.3 * mean_len / 10 + 0.4 * type_ratio(words) + 0.3 * len(words) / sentences / 30


FILTERS: dict[str, Callable[[str], bool]] = {"quality": is_good}
ORDERS: dict[str, Callable[[str], float]] = {"difficulty": difficulty}


class Selection:
    """Which training documents stay, and in which order; `facts` is for the manifest and counts them."""

    def __init__(
        self, filter_name: str | None = None, order_name: str | None = None, most: int | None = None
    ):
        self.keeps = FILTERS[filter_name] if filter_name else None
        self.rates = ORDERS[order_name] if order_name else None
        self.most = most
        self.facts = {"filter": filter_name, "order": order_name, "most": most, "dropped": 0}

    def apply(self, documents: Iterable) -> Iterator:
        """Yield the documents that stay, the first `most` of them. An order holds all of them in memory."""
        kept = documents if self.keeps is None else filter(self.is_kept, documents)
        if self.rates is not None:
            kept = sorted(kept, key=lambda document: self.rates(document.text))
        yield from islice(kept, self.most)

    def is_kept(self, document) -> bool:
        """Tell whether a document stays; count it otherwise."""
        is_kept = self.keeps(document.text)
        self.facts["dropped"] += not is_kept
        return is_kept


def add_selection_options(parser: argparse.ArgumentParser) -> None:
    """Declare what selects training documents, under the same names wherever some are read."""
    add = parser.add_argument
    add("--train-filter", choices=FILTERS, help="keep only such training documents")
    add("--train-order", choices=ORDERS, help="take training documents in this order; needs memory for all")
    add("--train-docs", type=at_least_one, metavar="N", help="of these the first N (default: all)")


def build_selection(options: argparse.Namespace) -> Selection:
    """Return the selection that the options ask for."""
    return Selection(options.train_filter, options.train_order, options.train_docs)
