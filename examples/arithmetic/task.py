"""Multi-step arithmetic modulo 100 with every step written out: problems, text, verifier.

A prompt lists the start value and one named operation per step, the completion carries a running
value through them and ends with the answer:

    prompt       47 A+3 B*7 C-9>
    completion   A:47+3=50 B:50*7=50 C:50-9=41 =41.

Multipliers are coprime to 100, so every operation is a bijection of the running value: a mistake
is carried to the answer and never cancels by itself.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from functools import cached_property
from itertools import product

MODULUS = 100
MULTIPLIERS = (3, 7, 9)
END = "."
SPARE = 16  # tokens that a rollout may have beyond a right one


@dataclass(frozen=True)
class Problem:
    start: int
    operations: tuple[tuple[str, str, int], ...]  # name of the step, operation, operand

    @property
    def prompt(self) -> str:
        listed = " ".join(f"{name}{op}{operand}" for name, op, operand in self.operations)
        return f"{self.start} {listed}>"

    @property
    def lines(self) -> list[str]:
        """The true steps, then the answer: what `completion` joins and `verify` compares with."""
        value, lines = self.start, []
        for name, op, operand in self.operations:
            result = apply(value, op, operand)
            lines.append(f"{name}:{value}{op}{operand}={result}")
            value = result
        return [*lines, f"={value}{END}"]

    @property
    def completion(self) -> str:
        return " ".join(self.lines)


@dataclass(frozen=True)
class Verdict:
    label: int  # 1 correct answer, 0 wrong answer, -1 no answer within the length limit
    first_wrong: int  # position of the first character of the first wrong step; -1 for label 1
    lucky: bool  # correct answer after a wrong step


def apply(value: int, op: str, operand: int) -> int:
    result = {"+": value + operand, "-": value - operand, "*": value * operand}[op]
    return result % MODULUS


@dataclass(frozen=True)
class Task:
    """Problems of a number of steps: their names, their characters and how long they get."""

    steps: int = 34

    @cached_property
    def names(self) -> list[str]:
        """One letter per step, two where there are not enough."""
        letters = string.ascii_uppercase + string.ascii_lowercase
        if self.steps <= len(letters):
            return list(letters[: self.steps])
        return ["".join(pair) for pair in product(letters, repeat=2)][: self.steps]

    @cached_property
    def vocabulary(self) -> list[str]:
        """Characters by token."""
        return [*string.digits, *"+-*=:> ", END, *dict.fromkeys("".join(self.names))]

    @cached_property
    def token_of(self) -> dict[str, int]:
        """Tokens by character."""
        return {character: token for token, character in enumerate(self.vocabulary)}

    @property
    def limit(self) -> int:
        """Tokens of a rollout at most: `A:47+3=50 ` per step, the answer, and some to spare."""
        return self.steps * len(f"{self.names[0]}:47+3=50 ") + len("=50.") + SPARE

    @property
    def context(self) -> int:
        """Tokens of a prompt and a rollout at most, in whole blocks of 128."""
        prompt = len("47") + self.steps * len(f" {self.names[0]}+3") + len(">")
        return -(-(prompt + self.limit) // 128) * 128

    def sample(self, rng: random.Random, steps: int | None = None) -> Problem:
        """A problem of `steps` steps, at most and by default those of the task."""
        steps = self.steps if steps is None else steps
        # A two-digit start gives every prompt the same length: no padding before ">" in a batch.
        start = rng.randrange(10, MODULUS)
        first = rng.randrange(self.steps - steps + 1)  # names from anywhere
        operations = []
        for name in self.names[first : first + steps]:
            op = rng.choice("+-*")
            operand = rng.choice(MULTIPLIERS) if op == "*" else rng.randrange(1, 10)
            operations.append((name, op, operand))
        return Problem(start, tuple(operations))

    def encode(self, text: str) -> list[int]:
        return [self.token_of[character] for character in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.vocabulary[token] for token in tokens)


def verify(problem: Problem, completion: str) -> Verdict:
    """Label of a completion and the position of its first wrong step.

    Up to its first wrong step a completion equals the truth character by character, so the first
    line that differs is the first step with a wrong result, a wrong copy or a malformed text.
    """
    lines, truth = completion.split(" "), problem.lines
    right = 0
    while right < min(len(lines), len(truth)) and lines[right] == truth[right]:
        right += 1
    whole = right == len(truth) == len(lines)
    position = -1 if whole else sum(len(line) + 1 for line in lines[:right])
    if not completion.endswith(END):
        return Verdict(-1, min(position, len(completion) - 1), False)
    if lines[-1] == truth[-1]:
        return Verdict(1, -1, not whole)
    return Verdict(0, position, False)
