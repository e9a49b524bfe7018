"""Blocks that keep their mask as a table of their own (GPT-Neo) see what the table says, at every place in a tree."""

from pathlib import Path

import pytest
import torch
from tests.families.checkpoint import write_checkpoint
from tests.families.configs import WINDOW
from tests.node.model.test_completeness import edit_tensors

from treeswarm.errors import ModelError, UnsupportedModel
from treeswarm.protocol.spans import Span
from treeswarm_node.model.check.family_check import check_family
from treeswarm_node.model.checkpoint.loader import load_span
from treeswarm_node.model.families import routes
from treeswarm_node.model.families.mask_tables import short_tables, tables_of, window_of, without_tables
from treeswarm_node.model.span_model import SpanModel

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint("gpt_neo", tmp_path)
    return tmp_path


def test_window_is_read_from_the_table_and_shortened(folder: Path) -> None:
    whole, local = load_span(folder, Span(0, 2), torch.float32, CPU).skeleton.transformer.h[:2]
    assert (window_of(whole), window_of(local)) == (None, WINDOW)
    with short_tables([whole, local], 8):
        assert (window_of(whole), window_of(local)) == (None, 8)
        (attention,) = tables_of(local)
        assert attention.bias[0, 0, 9].nonzero().flatten().tolist() == list(range(2, 10))
    with without_tables(local):
        assert attention.bias[:, :, 5:9, :600].all()
    assert window_of(local) == WINDOW


def test_check_notices_a_window_that_is_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_family(SpanModel(load_span(folder, Span(1, 2), torch.float32, CPU), 512))
    monkeypatch.setattr(routes, "window_of", lambda _: None)
    with pytest.raises(UnsupportedModel, match="differs from plain attention"):
        check_family(SpanModel(load_span(folder, Span(1, 2), torch.float32, CPU), 512))


def test_masks_that_old_checkpoints_store_are_left_out(folder: Path) -> None:
    name = "transformer.h.0.attn.attention"
    masks = {f"{name}.bias": torch.ones(1, 1, 512, 512, dtype=torch.bool), f"{name}.masked_bias": torch.tensor(-1e9)}
    edit_tensors(folder, lambda tensors: tensors.update(masks))
    loaded = load_span(folder, Span(0, 1), torch.float32, CPU).skeleton.transformer.h[0]
    assert not loaded.attn.attention.bias.all()
    edit_tensors(folder, lambda tensors: tensors.update({f"{name}.bias": torch.ones(64)}))
    with pytest.raises(ModelError, match=r"attention\.bias"):
        load_span(folder, Span(0, 1), torch.float32, CPU)
