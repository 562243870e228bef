"""The drafters that need no model: what they look up; a user's own class by name."""

import sys
from pathlib import Path

import pytest

from fxlm.compiler.errors import InvalidOption
from fxlm.runtime.drafters.base import Drafter
from fxlm.runtime.drafters.custom import custom_drafter
from fxlm.runtime.drafters.ngram import NgramDrafter
from fxlm.runtime.drafters.suffix import SuffixDrafter
from fxlm.runtime.request import Request
from fxlm.runtime.sequence import Sequence
from fxlm.runtime.speculative_config import SpeculativeConfig
from tests.runtime.fake import spec


def sequence(prompt: list[int], salt: str = "") -> Sequence:
    item = Request(request_id="a", prompt_token_ids=prompt, cache_salt=salt)
    return Sequence(item, order=0, seed=0, max_model_len=5000)


def ngram(text: list[int], limit: int, shortest: int = 1, longest: int = 3) -> list[int]:
    return NgramDrafter(shortest, longest).propose([sequence(text)], [limit])[0]


def test_ngrams_look_up_the_latest_copy_of_the_longest_end() -> None:
    assert ngram([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 2) == [9, 2]  # three tokens beat two
    assert ngram([2, 3, 9, 2, 3, 8, 2, 3], 2) == [8, 2]  # the latest copy
    assert ngram([5, 5, 5], 4) == [5, 5, 5, 5]
    assert ngram([7, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]
    assert ngram([4, 1, 5, 1], 2, shortest=2) == []
    assert ngram([1, 2, 3], 2) == []
    assert ngram([1], 2) == []


def test_ngrams_follow_a_growing_text() -> None:
    item = sequence([1, 2, 3] * 600)
    drafter = NgramDrafter(2, 5)
    found = []
    for token in (1, 2, 9, 3, 1):
        item.token_ids.append(token)
        found.append(drafter.propose([item], [2])[0])
        assert found[-1] == NgramDrafter(2, 5).propose([item], [2])[0]
    assert found == [[2, 3], [3, 1], [], [], [2, 9]]
    drafter.finish(item)
    assert not drafter._texts


def suffix(requests: int = 10, factor: float = 2.0, share: float = 0.1) -> SuffixDrafter:
    return SuffixDrafter(
        max_depth=10, max_cached_requests=requests, max_spec_factor=factor, min_token_prob=share
    )


def finish(drafter: SuffixDrafter, output: list[int], salt: str = "") -> None:
    item = sequence([0], salt)
    item.token_ids += output
    drafter.finish(item)


def test_suffixes_go_on_as_most_copies_do() -> None:
    text = [1, 2, 3, 9, 1, 2, 4, 8, 1, 2, 4, 7, 1, 2]
    assert suffix().propose([sequence(text)], [9]) == [[4, 7, 1, 2]]  # factor 2 of two matched
    assert suffix(factor=1.0).propose([sequence(text)], [9]) == [[4, 7]]
    assert suffix(share=0.5).propose([sequence(text)], [9]) == [[4]]  # two of three, one of three
    assert suffix(share=0.7).propose([sequence(text)], [9]) == [[]]
    assert suffix().propose([sequence([1, 2]), sequence([1])], [9, 9]) == [[], []]


def test_suffixes_prefer_the_longest_copy_and_keep_the_depth() -> None:
    drafter = suffix()
    finish(drafter, [4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15])
    assert drafter.propose([sequence([6, 1, 5, 6])], [9]) == [[7, 8, 9, 10]]
    assert drafter.propose([sequence([4, 5, 6, 7, 8, 9, 10])], [9]) == [[11, 12, 13]]
    assert drafter.propose([sequence([13, 14])], [9]) == [[15]]  # the text ends there


def test_suffixes_of_other_tenants_are_not_seen() -> None:
    drafter = suffix()
    finish(drafter, [4, 5, 6], salt="one")
    assert drafter.propose([sequence([4, 5])], [2]) == [[]]
    finish(drafter, [4, 5, 6])
    assert drafter.propose([sequence([4, 5]), sequence([4, 5], "one")], [2, 2]) == [[6], []]


def test_old_outputs_are_forgotten() -> None:
    drafter = suffix(requests=4)
    for number in range(6):
        finish(drafter, [number, 50, 60 + number])
    found = drafter.propose([sequence([n, 50]) for n in range(6)], [1] * 6)
    assert found == [[], [], [62], [63], [64], [65]]
    none = suffix(requests=0)
    finish(none, [4, 5, 6])
    assert none.propose([sequence([4, 5])], [2]) == [[]]
    one = suffix(requests=1)
    finish(one, [4, 5, 6])
    finish(one, [7, 8, 9])
    assert one.propose([sequence([4, 5]), sequence([7, 8])], [2, 2]) == [[], [9]]


def test_suffixes_of_a_growing_text_equal_those_of_a_whole_one() -> None:
    item, drafter = sequence([1, 2, 3] * 500), suffix()
    for token in (1, 2, 9, 3, 1, 2, 9):
        item.token_ids.append(token)
        assert drafter.propose([item], [4]) == suffix().propose([sequence(item.token_ids)], [4])


OWN = """
class Echo:
    def __init__(self, config, spec):
        self.most = config.most
    def propose(self, sequences, limits):
        return [s.token_ids[-1:] * self.most for s in sequences]
class Picky:
    def __init__(self): pass
class Scribe(Echo):
    def propose(self, sequences, limits):
        sequences[0].token_ids.append(3)
        return [[9], [9]]
class Idle:
    def __init__(self, config, spec): pass
number = 3
"""


def custom(name: str) -> Drafter:
    return custom_drafter(SpeculativeConfig(method="custom_class", model=name), spec(max_drafts=4))


def test_a_class_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_drafter.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    for name in (f"{tmp_path}/own_drafter.py:Echo", "own_drafter.Echo"):
        drafter = custom(name)
        assert drafter.propose([sequence([5, 6])], [2]) == [[6, 6, 6, 6]]
        drafter.finish(sequence([1]))
        assert drafter.name == "Echo"
    sys.modules.pop("own_drafter")


def test_a_users_class_cannot_change_what_was_generated(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    items = [sequence([5, 6]), sequence([7])]
    with pytest.raises(TypeError, match="read only"):
        custom(f"{tmp_path}/own.py:Scribe").propose(items, [2, 2])
    assert [item.token_ids for item in items] == [[5, 6], [7]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{file}:Ekko", "no class 'Ekko'"),
        ("{file}:number", "no class 'number'"),
        ("{file}:Picky", r"called with \(config, spec\) and raised TypeError"),
        ("{file}:Idle", r"no method propose\(sequences, limits\)"),
        ("nowhere.py:Echo", "a file that exists"),
        ("no_such_module.Echo", "does not import: ModuleNotFoundError"),
        ("Echo", "no class 'Echo'"),
    ],
)
def test_a_class_that_cannot_be_used_is_refused(name: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    with pytest.raises(InvalidOption, match=message):
        custom(name.format(file=file))
