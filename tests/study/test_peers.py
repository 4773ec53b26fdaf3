"""Weights of other tools in our UNet. Needs the `peers` extra, or says that it is missing."""

import copy
import sys

import pytest
import torch
from torch import nn

from sdcomp.errors import UserError
from sdcomp.study.peers import PEERS, peer_unet

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' own


def layers(unet):
    return {n: m for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


@pytest.mark.parametrize("bits", PEERS["quanto"][1])
def test_quanto_computes_with_these_weights(tiny, bits):
    pytest.importorskip("optimum.quanto")
    from optimum import quanto

    before = {name: p.clone() for name, p in tiny.unet.named_parameters()}
    found = layers(peer_unet("quanto", tiny.unet, bits))
    assert all(torch.equal(p, before[name]) for name, p in tiny.unet.named_parameters())
    name = next(n for n in found if n.endswith("attn1.to_q"))
    peer = nn.Sequential(copy.deepcopy(layers(tiny.unet)[name]))  # quanto takes its weight away
    quanto.quantize(peer, weights=f"qint{bits}")
    quanto.freeze(peer)
    x = torch.randn(5, found[name].in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(found[name](x), peer(x), atol=1e-5)
    assert all(not torch.equal(layer.weight, layers(tiny.unet)[n].weight) for n, layer in found.items())


@pytest.mark.parametrize("bits", PEERS["torchao"][1])
def test_torchao_rounds_linear_layers_to_whole_steps_of_their_channel(tiny, bits):
    pytest.importorskip("torchao.quantization")
    found, plain = layers(peer_unet("torchao", tiny.unet, bits)), layers(tiny.unet)
    for name, layer in found.items():
        if isinstance(layer, nn.Conv2d):
            assert torch.equal(layer.weight, plain[name].weight)
        else:
            assert max(len(row.unique()) for row in layer.weight[:8]) <= 2**bits
            assert not torch.equal(layer.weight, plain[name].weight)


def test_bits_that_a_peer_does_not_have_are_refused(small):
    with pytest.raises(ValueError, match=r"quanto is asked for \(8, 4, 2\) bits, not for 3"):
        peer_unet("quanto", small.unet, 3)


@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_that_is_missing_is_named(small, monkeypatch, peer):
    for module in ("optimum", "optimum.quanto", "torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"{peer} is not installed: install the extra `peers`"):
        peer_unet(peer, small.unet, 8)
