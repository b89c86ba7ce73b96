"""What an update must be, to be captured as a CUDA graph: tensors in, tensors out, no value read by the host on the way."""

import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from torch.utils._python_dispatch import TorchDispatchMode

SCRIPTS = {name.split("/")[-1]: load_script(name)
           for name in ("beta_vmbpo", "vmbpo", "baselines/mbpo", "sac_iterative", "active_vem")}
SMALL = {"hidden_dim": 16, "model_dim": 16, "model_layers": 2, "ensemble_size": 3, "num_elites": 2, "updates_per_step": 2,
         "batch_size": 16, "rollouts": 40, "model_buffer_size": 100, "min_first_batches": 2, "min_batches": 2,
         "action_samples": 3, "windows": 4, "window_length": 5, "device": "cpu"}
SYNCS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2"}


class NoHostReads(TorchDispatchMode):
    """Raises where a value, or a shape that hangs on values, would have to come from the device to the host."""

    def __enter__(self):
        def read(tensor, *_):
            raise AssertionError("a tensor goes to the host")

        self.patch = pytest.MonkeyPatch()
        for method in ("cpu", "numpy", "tolist"):  # on the CPU these are no operations that could be seen
            self.patch.setattr(torch.Tensor, method, read)
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in SYNCS or name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1]):
            raise AssertionError(f"{name} makes the host wait for the device")
        return func(*args, **(kwargs or {}))


def agent_and_buffers(name, **flags):
    """A small agent of the script with filled buffers: what its main has when it begins to learn."""
    script, trials = SCRIPTS[name], 2
    known = {key: value for key, value in (SMALL | flags).items() if key in script.Args.__annotations__}
    args = script.Args(trials=trials, **known)
    agent = script.Agent(args, 3, 2)
    obs, action, one = torch.randn(trials, 60, 3), torch.rand(trials, 60, 2) * 2 - 1, torch.rand(trials, 60, 1)
    columns = [x.to(args.device) for x in (obs, action, one, obs + 0.1, (one > 0.9).float())]
    if name == "active_vem":
        buffer = script.EpisodeBuffer(trials, 100, agent.widths, args.device)
        latent = torch.zeros(trials, 1, agent.latent_dim, device=args.device)
        for i in range(60):
            place = torch.full((trials, 1, 1), i % 20, device=args.device)
            buffer.add(*(column[:, i : i + 1] for column in columns), latent, place)
        return agent, (buffer,)
    count = 1 if name == "sac_iterative" else 2
    buffers = [script.ReplayBuffer(trials, 100, 3, 2, args.device) for _ in range(count)]
    for buffer in buffers:
        buffer.add(*columns)
    if name != "sac_iterative":
        agent.fit_model(buffers[0])
    return agent, buffers


VARIANTS = [*((name, {}) for name in SCRIPTS), ("sac_iterative", {"inference": "direct", "prior": "uniform"}),
            ("sac_iterative", {"input_norm": "layer"}), ("beta_vmbpo", {"log_ratio_in_critic": True}),
            ("beta_vmbpo", {"critic_norm": True}), ("sac_iterative", {"critic_norm": True}),
            ("active_vem", {"agent": "discriminative"}), ("active_vem", {"marginal_weight": 0.5, "info_weight": 0.1})]


@pytest.mark.parametrize("name, flags", VARIANTS, ids=str)
def test_no_update_waits_for_the_device(name, flags):
    agent, buffers = agent_and_buffers(name, **flags)
    with NoHostReads():
        agent.learn(*buffers)
        if name == "beta_vmbpo":
            agent.update_beta()
        if hasattr(agent, "imagine"):
            agent.imagine(*buffers, 0)
            batch = buffers[0].storage[None].expand(3, -1, -1, -1)[:, :, :16].split(buffers[0].widths, -1)
            agent.model_loss(agent.model, batch).backward()


def test_host_reads_are_seen():
    x = torch.rand(3)
    for read in (lambda: x[0].item(), lambda: float(x.sum()), lambda: bool((x > 0).all()), lambda: x[x > 0.5],
                 lambda: x.tolist(), lambda: x.cpu()):
        with pytest.raises(AssertionError, match="host"), NoHostReads():
            read()


@pytest.mark.parametrize("out_dim", [1, 4])
@pytest.mark.parametrize("stack", [(3,), (2, 3)])
def test_a_stacked_layer_is_one_layer_per_member(stack, out_dim):
    """Values and gradients of each form against torch's own linear layer, for an input that the stack shares."""
    layer = SCRIPTS["sac_iterative"].StackedLinear(stack, 5, out_dim).double()
    x = torch.randn(3, 7, 5, dtype=torch.double, requires_grad=True)
    weight, bias = (y.expand(2, 3, *y.shape[-2:]) for y in (layer.weight, layer.bias))
    expected = torch.stack([torch.stack([F.linear(x[j], weight[i, j].mT, bias[i, j, 0]) for j in range(3)])
                            for i in range(2)])
    expected = expected if len(stack) == 2 else expected[0]
    torch.testing.assert_close(layer(x), expected)
    push, inputs = torch.randn_like(expected), (x, layer.weight, layer.bias)
    for ours, theirs in zip(torch.autograd.grad(layer(x), inputs, push), torch.autograd.grad(expected, inputs, push)):
        torch.testing.assert_close(ours, theirs)


def test_a_stack_with_bfloat16_inside():
    """bfloat16 has eight binary digits: outputs and gradients, which stay float32, agree to a few percent."""
    exact, rounded = (SCRIPTS["sac_iterative"].StackedMLP((2, 3), (5, 64, 64, 4), dtype=dtype)
                      for dtype in (None, torch.bfloat16))
    rounded.load_state_dict(exact.state_dict())
    x, seen, found = torch.randn(3, 50, 5), [], []
    for net in (exact, rounded):
        net.layers[1].register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
        out = net(x)
        found.append((out, *torch.autograd.grad(out.square().sum(), net.parameters())))
    assert seen == [torch.float32, torch.bfloat16]
    for one, other in zip(*found):
        assert one.dtype == other.dtype == torch.float32
        assert 1e-5 < (other - one).norm() / one.norm() < 0.08


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "active_vem"])
def test_normalised_critics(name):
    """By numbers alone, for each twin and trial; far from all data Q stays below the norm of its last layer."""
    agent, _ = agent_and_buffers(name, critic_norm=True, matmul_precision="highest")
    agent.double()
    x = torch.randn(2, 7, agent.critic.layers[0].weight.shape[-2], dtype=torch.double)  # (trials, n, obs and action)
    for critic in (agent.critic, agent.critic_target):
        q, far = critic(x), critic(1e6 * x)
        *hidden, last = critic.layers
        for twin in range(2):
            for trial in range(2):
                y = x[trial]
                for layer in hidden:
                    y = y @ layer.weight[twin, trial] + layer.bias[twin, trial]
                    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
                    y = y.clamp(min=0)
                torch.testing.assert_close(q[twin, trial], y @ last.weight[twin, trial] + last.bias[twin, trial])
        assert (far <= 16**0.5 * last.weight.norm(dim=-2, keepdim=True) + last.bias.abs()).all()
    normalised = {key for key, net in agent.named_children() if getattr(net, "norm", False)}
    plain, _ = agent_and_buffers(name)
    assert normalised == {"critic", "critic_target"} and not plain.critic.norm


@pytest.mark.parametrize("name", SCRIPTS)
def test_medium_precision_is_that_of_actors_and_critics(name):
    """Outside of fits they alone have bfloat16 inside: dynamics magnify what is rounded where their variances are small."""
    agent, _ = agent_and_buffers(name, matmul_precision="medium")
    low = {key for key, net in agent.named_children() if getattr(net, "dtype", None) == torch.bfloat16}
    assert low == {"actor", "critic", "critic_target"} | ({"prior_actor"} if name == "active_vem" else set())


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_other_products_are_exact(precision):
    """Of every shape that a fit has, whichever library computes them."""
    SCRIPTS["mbpo"].set_precision(SCRIPTS["mbpo"].Args(device="cpu", matmul_precision=precision))
    for width, out in ((23, 200), (200, 200), (200, 36), (64, 64)):
        x, weight = torch.randn(7, 256, width), torch.randn(7, width, out)
        for one, other in ((x, weight), (x.mT, x @ weight), (x @ weight, weight.mT)):
            expected = one.double() @ other.double()
            assert ((one @ other - expected).norm() / expected.norm()) < 1e-6
    torch.set_float32_matmul_precision("highest")


def test_where_a_processor_rounds_float32_at_medium(monkeypatch):
    """AMX and GPUs do; what is asked for otherwise stays as it is."""
    script = SCRIPTS["beta_vmbpo"]
    for amx, device, asked, expected in ((True, "cpu", "medium", "highest"), (False, "cpu", "medium", "medium"),
                                         (False, "cuda", "medium", "highest"), (True, "cuda", "high", "high"),
                                         (True, "cpu", "highest", "highest")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx, "avx512_bf16": True})
        script.set_precision(script.Args(device=device, matmul_precision=asked))
        assert torch.get_float32_matmul_precision() == expected
    torch.set_float32_matmul_precision("highest")
