"""--cuda-graph: what is replayed is what would have been done. Without CUDA, a tape of operations stands in for the graph."""

import contextlib
import types

import pytest
import torch
from conftest import load_script
from test_update import VARIANTS, NoHostReads, agent_and_buffers
from torch.utils._pytree import tree_leaves


class Tape(NoHostReads):
    """A CUDA graph as far as a function can tell: while captured an operation is written down, with the tensors that it met,
    and has no effect; a replay repeats the operations on those very tensors. Python does not run again."""

    def __init__(self):
        super().__init__()
        self.operations, self.before, self.replays = [], {}, 0

    def __enter__(self):
        self.random = torch.get_rng_state()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch.set_rng_state(self.random)
        for storage, content in self.before.values():
            storage.copy_(content)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for argument, value in zip(func._schema.arguments, args):
            for tensor in tree_leaves(value) if argument.alias_info and argument.alias_info.is_write else ():
                storage = tensor.untyped_storage()
                self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.operations.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.operations:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                if isinstance(new, torch.Tensor) and new.untyped_storage().data_ptr() != old.untyped_storage().data_ptr():
                    old.copy_(new)


@pytest.fixture
def tapes(monkeypatch):
    """Puts tapes in the place of torch.cuda's graphs, and returns the list of them."""
    made, stream = [], types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(Tape()) or made[-1])
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return made


def trained(name, flags, device="cpu"):
    """What five steps leave behind, with new rows before each and a fit in the middle: parameters, moments, metrics."""
    torch.manual_seed(0)
    agent, buffers = agent_and_buffers(name, **{"min_first_batches": 6, "min_batches": 6} | flags | {"device": device})
    metrics = []
    for step in range(5):
        if name != "active_vem":
            buffers[0].add(torch.randn(2, 3, sum(buffers[0].widths), device=device).abs())
        if step == 3 and hasattr(agent, "fit_model"):
            metrics.append(agent.fit_model(buffers[0]))
        metrics.append(agent.learn(*buffers, *[step] * (name in ("beta_vmbpo", "vmbpo"))))
        metrics[-1] = {key: value.clone() for key, value in metrics[-1].items()}
    assert not any(value.requires_grad for value in tree_leaves(metrics))  # or autograd's graph would outlive the call
    moments = [opt.state_dict()["state"] for opt in agent.opts.values()]
    return agent.state_dict(), moments, metrics, [buffer.storage for buffer in buffers]


@pytest.mark.parametrize("name, flags", VARIANTS, ids=str)
def test_captured_is_eager(name, flags, tapes):
    """Bit for bit, with the same random numbers: no Python number and no branch of the host decides what is replayed."""
    eager = trained(name, flags)
    assert not tapes
    captured = trained(name, flags | {"cuda_graph": True})
    torch.testing.assert_close(captured, eager, rtol=0, atol=0)
    fits = 0 if name in ("sac_iterative", "active_vem") else 2
    assert len(tapes) == 1 + fits and all(tape.replays > 2 for tape in tapes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name, flags", VARIANTS, ids=str)
def test_captured_is_eager_on_cuda(name, flags):
    eager, captured = (trained(name, flags | {"cuda_graph": on}, "cuda") for on in (False, True))
    torch.testing.assert_close(captured, eager, rtol=1e-5, atol=1e-5)


CAPTURED = load_script("sac_iterative").captured
ON = types.SimpleNamespace(cuda_graph=True, device="cpu")


def test_a_number_that_python_counts_is_frozen(tapes):
    """The tape would show it: the count stands still where the tensor's goes on, and a result is overwritten."""
    count, total = [0], torch.zeros(())

    def function(x):
        count[0] += 1
        return total.add_(1) + x, torch.full((), float(count[0]))

    replay, x = CAPTURED(function, ON), torch.zeros(())
    results = [replay(x) for _ in range(5)]
    assert [result[0].item() for result in results] == [1, 2, 5, 5, 5] and total == 5
    assert [result[1].item() for result in results] == [1, 2, 3, 3, 3] and count[0] == 3
    x += 10  # a new value in the old place reaches the replay, a new tensor would not
    assert replay(x)[0] == 16


def test_a_value_that_the_host_reads_cannot_be_captured(tapes):
    replay = CAPTURED(lambda: torch.rand(()).item(), ON)
    replay(), replay()
    with pytest.raises(AssertionError, match="host"):
        replay()


def test_without_the_flag_nothing_is_wrapped():
    function = lambda: None
    assert CAPTURED(function, types.SimpleNamespace(cuda_graph=False)) is function


@pytest.mark.parametrize("name", ["beta_vmbpo", "vmbpo", "baselines/mbpo", "sac_iterative", "active_vem"])
def test_refused_without_cuda(name, capsys, tmp_path):
    flags = ["--env-id", "Pendulum-v1", "--run-dir", str(tmp_path / "run"), "--cuda-graph", "--device", "cpu"]
    for wrong, said in ((flags, "--cuda-graph: needs --device cuda"), *[
        ([*flags, "--prior-interval", "3"], "--prior-interval 3: must divide --updates-per-step with --cuda-graph")
    ] * ("vmbpo" in name)):
        with pytest.raises(SystemExit) as stopped:
            load_script(name).parse_args(wrong)
        lines = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and len(lines) == 1 and said in lines[0] and not (tmp_path / "run").exists()
