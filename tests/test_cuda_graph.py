"""--cuda-graph: what is replayed is what would have been done, where there is CUDA; elsewhere it is refused."""

import sys

import pytest
import torch
from conftest import load_script
from test_update import VARIANTS, agent_and_buffers
from torch.utils._pytree import tree_leaves


def trained(name, flags):
    """What five steps leave behind, with new rows before each and a fit in the middle: parameters, moments, metrics.

    active VEM has one window per update: of windows that overlap, CUDA keeps the latent states of any.
    """
    torch.manual_seed(0)
    sizes = {"min_first_batches": 6, "min_batches": 6, "windows": 1, "device": "cuda"}
    agent, buffers = agent_and_buffers(name, **sizes | flags)
    metrics = []
    for step in range(5):
        if name != "active_vem":
            buffers[0].add(torch.randn(2, 3, sum(buffers[0].widths), device="cuda").abs())
        if step == 3 and hasattr(agent, "fit_model"):
            metrics.append(agent.fit_model(buffers[0]))
        metrics.append(agent.learn(*buffers))
        metrics[-1] = {key: value.clone() for key, value in metrics[-1].items()}
    assert not any(value.requires_grad for value in tree_leaves(metrics))  # or autograd's graph would outlive the call
    moments = [opt.state_dict()["state"] for opt in agent.opts.values()]
    return agent.state_dict(), moments, metrics, [buffer.rows() for buffer in buffers]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs exist on an NVIDIA GPU alone; none is here")
@pytest.mark.parametrize("name, flags", VARIANTS, ids=str)
def test_captured_is_eager_on_cuda(name, flags):
    pytest.importorskip("tensordict")
    eager, captured = (trained(name, flags | {"cuda_graph": on}) for on in (False, True))
    torch.testing.assert_close(captured, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "auto"])
@pytest.mark.parametrize("name", ["beta_vmbpo", "vmbpo", "baselines/mbpo", "sac_iterative", "active_vem"])
def test_refused_without_cuda_or_tensordict(name, device, capsys, monkeypatch):
    if device == "auto" and torch.cuda.is_available():  # there is CUDA, but not the package
        monkeypatch.setitem(sys.modules, "tensordict", None)
    with pytest.raises(SystemExit) as stopped:
        load_script(name).parse_args(["--env-id", "Pendulum-v1", "--cuda-graph", "--device", device])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and " --cuda-graph: " in line
