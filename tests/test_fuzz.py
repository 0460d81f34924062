"""Broken files, by accident or by intent: a release is refused with an error that says why, or loads as the very same model."""

import copy
import json
import shutil
import struct
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from common.recipe import Recipe, RecipeError
from configuration_multitask import WEIGHTS_INDEX
from modeling_multitask import MultiTaskModel, WeightsError
from release.check import check
from tests.conftest import ROOT

CONFIG, HEADS = "config.json", "heads/model.safetensors"
WEIGHTS = ("model.safetensors", "2_Dense/model.safetensors", HEADS)
GONE = object()  # takes a node out
Place = tuple[str | int, ...]

some = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
numbers = st.integers(-3, 40) | st.sampled_from([2**31, -(2**63), 2**70, 10**400]) | st.floats()
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=8),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3),
    max_leaves=5,
)


def nodes(value: Any, path: Place = ()) -> Iterator[Place]:
    """Yields the path of every node of parsed JSON or TOML, the root included."""
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from nodes(item, (*path, key))


def replaced(value: Any, path: Place, new: Any) -> Any:
    """Returns a copy in which another value stands at `path`, or nothing for `GONE`."""
    if not path:
        return {} if new is GONE else new
    root = parent = copy.deepcopy(value)
    for key in path[:-1]:
        parent = parent[key]
    if new is GONE:
        del parent[path[-1]]
    else:
        parent[path[-1]] = new
    return root


class Target:
    """A release to break, and the weights that it should have."""

    def __init__(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        self.folder = folder
        self.weights = weights

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text("utf-8"))

    def refuses(self, name: str, content: bytes | dict[str, Any]) -> bool:
        """Returns whether the release does not load with other content in one file, which is put back then.

        Fails on an unclean error, on other weights than the release's own, and on what release.check overlooks.
        """
        path = self.folder / name
        before = path.read_bytes()
        try:
            path.unlink()  # a loaded model may still be reading the old file
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
            return self._refuses()
        finally:
            path.unlink()
            path.write_bytes(before)

    def _refuses(self) -> bool:
        problems = check(self.folder)
        try:
            model = MultiTaskModel.from_pretrained(self.folder)
        except (OSError, ValueError, WeightsError) as error:
            assert str(error) and problems, f"release.check overlooks {error!r}"
            return True
        for key, value in model.state_dict().items():
            torch.testing.assert_close(
                value.float(), self.weights[key], rtol=1e-2, atol=1e-2, msg=f"{key} has other numbers"
            )
        return False


@pytest.fixture(scope="module")
def target(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Target:
    """A copy of the tiny release, beside which lie heads with other weights and a copy of the index."""
    parent = tmp_path_factory.mktemp("fuzz")
    save_file({key: value + 1 for key, value in load_file(release / HEADS).items()}, parent / "evil.safetensors")
    shutil.copy(release / WEIGHTS_INDEX, parent / "evil.safetensors.index.json")
    weights = MultiTaskModel.from_pretrained(release).state_dict()
    return Target(Path(shutil.copytree(release, parent / "release")), weights)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS_INDEX])
@some
@given(data=st.data())
def test_any_value_anywhere_in_a_json_file(name, data, target):
    fields = target.json(name)
    path = data.draw(st.sampled_from(list(nodes(fields))))
    target.refuses(name, json.dumps(replaced(fields, path, data.draw(values | st.just(GONE)))).encode())


@pytest.mark.parametrize("field", [
    {"num_hidden_layers": 10**9}, {"num_labels": 10**9}, {"hidden_size": 2**20}, {"vocab_size": 2**40}, {"embedding_dim": 2**40},
    {"num_attention_heads": 0}, {"hidden_act": "x"}, {"dtype": "x"}, {"dtype": "int8"}, {"check": 1}, {"model_type": "distilbert"},
    {"multitask_weights": "../evil.safetensors.index.json"}, {"transformers_weights": "../evil.safetensors.index.json"},
], ids=str)  # fmt: skip
def test_fields_that_would_take_hours_memory_or_other_files_are_refused(field, target):
    fields = target.json(CONFIG)
    if "transformers_weights" in field:
        del fields["multitask_weights"]
    assert target.refuses(CONFIG, {**fields, **field})


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS_INDEX])
@pytest.mark.parametrize("content", [
    b"", b"[]", b"null", b'"x"', b"\xff", b'{"metadata": {}, "weight_map": {}}', b"[" * 10**5, b'{"a":' * 10**5,
], ids=range(8))  # fmt: skip
def test_what_is_no_json_object_or_says_nothing(name, content, target):
    assert target.refuses(name, content)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS_INDEX, *WEIGHTS])
@some
@given(data=st.data())
def test_flipped_bytes_and_lost_ends(name, data, target):
    content = bytearray((target.folder / name).read_bytes())
    end = 8 + struct.unpack("<Q", content[:8])[0] if name in WEIGHTS else len(content)  # numbers have no check sum
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, end - 1))] ^= data.draw(st.integers(1, 255))
    target.refuses(name, bytes(content))


@pytest.mark.parametrize("name", WEIGHTS)
def test_integers_are_not_taken_for_weights(name, target):
    assert target.refuses(name, (target.folder / name).read_bytes().replace(b'"F32"', b'"I32"', 1))


@some
@given(
    parts=st.lists(
        st.sampled_from(["..", ".", "", "heads", "model", "evil", "release", "~", "C:", "\0", "\ud800"]), max_size=5
    ),
    separator=st.sampled_from(["/", "\\", "//"]),
    absolute=st.booleans(),
)
@example(parts=["..", "evil"], separator="/", absolute=False)
@example(parts=["heads", "..", "..", "evil"], separator="/", absolute=False)
@example(parts=["..", "evil"], separator="\\", absolute=False)
@example(parts=["evil"], separator="/", absolute=True)
@example(parts=["heads", ".", "model"], separator="/", absolute=False)
def test_no_path_leads_out_of_the_folder(parts, separator, absolute, target):
    parts = [str(target.folder.parent), *parts] if absolute else parts
    index = target.json(WEIGHTS_INDEX)
    heads = {key: separator.join(parts) + ".safetensors" for key, file in index["weight_map"].items() if file == HEADS}
    index["weight_map"] |= heads
    target.refuses(WEIGHTS_INDEX, index)  # or else it has the weights that lie in its folder


RECIPE = tomllib.loads((ROOT / "training/recipes/smoke.toml").read_text("utf-8"))


@given(path=st.sampled_from(list(nodes(RECIPE))), value=values.filter(lambda x: x is not None))
def test_any_value_anywhere_in_a_recipe(path, value):
    try:
        assert isinstance(Recipe.build(replaced(RECIPE, path, value), "r.toml"), Recipe)
    except RecipeError as error:
        assert str(error).startswith("r.toml:\n")


@given(setting=st.text(alphabet="run.sed=task1[{\"'\n", max_size=20))
@example("run.seed=" + "9" * 5000)
def test_any_setting_on_the_command_line(setting):
    try:
        Recipe.read(ROOT / "training/recipes/smoke.toml", overrides=[setting])
    except RecipeError as error:
        assert str(error)
