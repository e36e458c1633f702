"""What is seen of decoder blocks, and that looking leaves no trace."""

import pytest
import torch

from llmqat.config import QATConfig
from llmqat.convert import prepare
from llmqat.errors import ConfigError
from llmqat.train.block_losses import attention_divergence
from llmqat.train.observe import BlockObserver, parse_layers
from tests.llmqat.tiny import random_tokens, tiny_llama
from tests.llmqat.tiny_families import FIELDS, tiny_model
from tests.llmqat.training import build_trainer

pytestmark = pytest.mark.usefixtures("on_reference")


def _states(model, layers=None, *, hidden=True, attention=True, **inputs):
    observer = BlockObserver("model", model, layers, hidden=hidden, attention=attention)
    with observer.watch() as states:
        model(**inputs)
    return states


def test_layers():
    model = tiny_llama(layers=3)
    whole = _states(model, input_ids=random_tokens(0, 1, 5))
    assert len(whole) == 3
    some = _states(model, parse_layers("-1,0"), input_ids=random_tokens(0, 1, 5))
    assert torch.equal(some[0].hidden, whole[2].hidden)
    assert torch.equal(some[1].query, whole[0].query)
    assert len(_states(model, parse_layers("last"), input_ids=random_tokens(0, 1, 5))) == 1


def test_watching_leaves_nothing_behind():
    model = prepare(tiny_llama(), QATConfig.parse("4-8-4", kv_mode="serving"))
    ids = random_tokens(0, 1, 5)
    before = model(ids).logits
    _states(model, input_ids=ids)
    assert torch.equal(model(ids).logits, before)
    assert not any(block._forward_hooks for block in model.model.layers)
    assert model.config._attn_implementation == "llmqat_sdpa"


def test_only_what_was_asked_for_is_kept():
    ids = random_tokens(0, 1, 5)
    assert _states(tiny_llama(), attention=False, input_ids=ids)[0].query is None
    assert _states(tiny_llama(), hidden=False, input_ids=ids)[0].hidden is None


def test_two_models_of_one_attention_do_not_mix():
    one, other = tiny_llama(), tiny_llama(seed=1)
    observer = BlockObserver("one", one, None, hidden=False, attention=True)
    with observer.watch() as states:
        one(random_tokens(0, 1, 5))
        query = states[0].query
        other(random_tokens(0, 1, 5))
    assert states[0].query is query


def test_a_forward_that_hands_nothing_over():
    observer = BlockObserver("student", tiny_llama(), None, hidden=False, attention=True)
    with (
        pytest.raises(ConfigError, match=r"model.layers.0 of the student calls no attention"),
        observer.watch(),
    ):
        pass


def test_eager_attention_is_refused(tmp_path):
    eager = tiny_llama()
    eager.set_attn_implementation("eager")
    student = prepare(tiny_llama(), QATConfig.parse("4-8-8"))
    with pytest.raises(ConfigError, match="attention needs the teacher in sdpa attention"):
        build_trainer(tmp_path, loss="attention", student=student, teacher=eager)


@pytest.mark.parametrize("family", FIELDS)
def test_every_family_is_seen(family):
    """Windows, norms of heads and learned positions: the maps are the library's."""
    models, ids = [tiny_model(family, seed) for seed in (0, 1)], random_tokens(0, 1, 12)
    with torch.no_grad():
        states = [_states(model, input_ids=ids) for model in models]
        for model in models:
            model.set_attn_implementation("eager")
        own, other = (
            model(ids, output_attentions=True, output_hidden_states=True) for model in models
        )
    kl = [
        (t * (t.clamp(min=1e-30).log() - s.clamp(min=1e-30).log())).sum(-1).mean()
        for s, t in zip(own.attentions, other.attentions, strict=True)
    ]
    expected = torch.stack(kl).mean().item()
    assert attention_divergence(*states, None).item() == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(states[0][0].hidden, own.hidden_states[1], rtol=1e-4, atol=1e-4)
