"""The README's example runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import torch


def test_example() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict[str, object] = {}
    exec(code, names)
    weighted, plain = names["token_advantages"], names["advantages"]
    assert isinstance(weighted, torch.Tensor)
    assert isinstance(plain, torch.Tensor)
    assert weighted.shape == (8, 300)
    assert torch.equal(weighted.sign(), plain.sign()[:, None].expand_as(weighted))
    assert not torch.equal(weighted, plain[:, None].expand_as(weighted))
