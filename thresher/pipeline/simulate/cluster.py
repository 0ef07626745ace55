"""What a large model on a cluster of GPUs would cost: operations, bytes and messages of one GPU, from shapes alone.

Nothing here is measured on such a cluster. Every number that goes in is a field below, with its default.
"""

from dataclasses import dataclass

from thresher.pipeline.simulate.costs import Costs, Term, Traffic, causal_pairs, even_layers
from thresher.pipeline.simulate.link import Link
from thresher.pipeline.simulate.memory import Footprint

BF16, FP32 = 2, 4
"""Bytes of a number."""


@dataclass(frozen=True)
class Transformer:
    """A decoder-only language model with grouped queries and a gated feed-forward.

    Attributes:
        layers: L.
        width: of hidden states and of queries, D.
        key_width: of keys, and of values.
        hidden: of the feed-forward.
        vocabulary: rows of the embedding and of the output layer, which is not tied to it.
    """

    layers: int
    width: int
    key_width: int
    hidden: int
    vocabulary: int

    @property
    def gated(self) -> int:
        """Parameters of the first feed-forward matrix, gate and value."""
        return 2 * self.width * self.hidden

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        return 2 * self.width * (self.width + self.key_width) + 3 * self.width * self.hidden

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.layers * self.layer + 2 * self.vocabulary * self.width

    def step_flops(self, tokens: int, sequences: int) -> float:
        """Operations the model needs per step: causal attention, nothing computed twice, embedding lookup free."""
        dense = 2 * (self.parameters - self.vocabulary * self.width) * tokens
        attention = 4 * self.width * causal_pairs(0, tokens) * self.layers
        return 3.0 * sequences * (dense + attention)


LLAMA_70B = Transformer(layers=80, width=8192, key_width=1024, hidden=28672, vocabulary=128256)


@dataclass(frozen=True)
class Gpu:
    """What one GPU reaches, and what it is connected to.

    Attributes:
        peak_flops: bf16, dense.
        matmul, attention_forward, attention_backward: shares of the peak that kernels reach.
        usable_bytes: memory left beside the runtime and communicators.
        node_bytes_per_s: to its neighbours in a node, each way, as reached.
        network_bytes_per_s: to other nodes, each way, as reached.
        latency_s: of a message to another node.
        exposed: share of tensor-parallel communication that computation does not hide.
        launch_s: what a layer costs however short its slice.
    """

    peak_flops: float = 989e12
    matmul: float = 0.70
    attention_forward: float = 0.60
    attention_backward: float = 0.50
    usable_bytes: float = 74 * 2**30
    node_bytes_per_s: float = 360e9
    network_bytes_per_s: float = 40e9
    latency_s: float = 15e-6
    exposed: float = 0.5
    launch_s: float = 50e-6


@dataclass(frozen=True)
class Run:
    """How a model is laid out over a cluster.

    Attributes:
        policy: of the pipeline.
        gpus: in all, t * c * d * p.
        tokens: per sequence, S.
        sequences: per step, over all replicas.
        tensor, context, stages: t, c, p.
        chunks, slices: v, n.
        recompute: "none", "partial" (norms, activation function and first feed-forward matrix) or "full" (layer).
        offload: share of activations kept in the host's memory, at no cost in time.
        exchange: attention is shared between ranks where it pays.
        split_head: the output layer is cut over the stages; otherwise the last one has it.
    """

    policy: str
    gpus: int
    tokens: int
    sequences: int
    tensor: int
    context: int
    stages: int
    chunks: int = 1
    slices: int = 1
    recompute: str = "none"
    offload: float = 0.0
    exchange: bool = False
    split_head: bool = False

    @property
    def parts(self) -> int:
        """GPUs that share each stage's work, t c."""
        return self.tensor * self.context

    @property
    def replicas(self) -> int:
        """Data-parallel replicas, d."""
        return self.gpus // (self.parts * self.stages)

    @property
    def microbatches(self) -> int:
        """Per replica and step, m: one sequence each."""
        return self.sequences // self.replicas

    @property
    def is_sliced(self) -> bool:
        """Whether sequences are cut, so that keys and values are kept even where layers are recomputed."""
        return self.slices > 1


def costs_of(model: Transformer, gpu: Gpu, run: Run) -> Costs:
    """Seconds and message bytes of one GPU's part of each operation.

    Ring communication of context parallelism is taken to be hidden behind attention. Tensor parallelism gathers and
    scatters twice per layer forward, three times backward.
    """
    dense = 2 * model.layer / run.parts / (gpu.peak_flops * gpu.matmul)
    gather = 2 * BF16 * model.width * (run.tensor - 1) / run.tensor / run.context / gpu.node_bytes_per_s * gpu.exposed
    pair = 4 * model.width / run.parts / gpu.peak_flops
    forward = Term(dense + 2 * gather, pair / gpu.attention_forward, gpu.launch_s)
    again = {
        "none": Term(),
        "partial": Term(dense * model.gated / model.layer),
        "full": forward,
    }[run.recompute]
    backward = Term(
        2 * dense + 3 * gather + again.per_token,
        2.5 * pair / gpu.attention_backward + again.per_pair,
        2 * gpu.launch_s + again.fixed,
    )
    logits = Term(2 * model.vocabulary * model.width / run.parts / (gpu.peak_flops * gpu.matmul))
    hidden = BF16 * model.width / run.parts
    return Costs(
        bounds=tuple(run.tokens * i // run.slices for i in range(run.slices + 1)),
        forward=forward,
        backward=backward,
        layers=even_layers(model.layers, run.stages * run.chunks),
        head=logits.scaled(2),
        head_weight=logits,
        traffic=Traffic(hidden, 2 * FP32 / run.parts, FP32 / run.parts, 2 * BF16 * model.key_width / run.parts, hidden),
    )


def footprint_of(model: Transformer, run: Run) -> Footprint:
    """Bytes of one GPU: bf16 parameters, fp32 gradients, Adam's three fp32 numbers sharded over c d."""
    saved = {
        "none": BF16 * (6 * model.width + 3 * model.hidden),
        "partial": BF16 * 4 * model.width,
        "full": BF16 * model.width,
    }
    keys = 2 * BF16 * model.key_width if run.is_sliced or run.recompute != "full" else 0
    whole_layer = saved["none"] / run.parts * run.tokens / run.slices
    table = model.vocabulary * model.width / (run.stages if run.split_head else 1)
    weights = model.layers * model.layer / run.stages + table
    states = weights / run.tensor * (BF16 + FP32 + 3 * FP32 / (run.context * run.replicas))
    return Footprint(
        activations=saved[run.recompute] / run.parts * (1 - run.offload),
        key_value=keys / run.parts,
        accumulators=2 * FP32 * model.key_width / run.parts if run.is_sliced else 0.0,
        logits=FP32 * model.vocabulary / run.parts,
        # One layer at a time is there in full while its backward runs.
        states=states + whole_layer,
    )


def wire_of(gpu: Gpu) -> Link:
    """Stages are on different nodes."""
    return Link(gpu.latency_s, gpu.network_bytes_per_s)


def synchronisation_s(model: Transformer, gpu: Gpu, run: Run) -> float:
    """Reduce-scatter of fp32 gradients and all-gather of bf16 parameters over c d GPUs, not hidden."""
    group = run.context * run.replicas
    held = model.parameters / (run.tensor * run.stages)
    return held * (FP32 + BF16) * (group - 1) / group / gpu.network_bytes_per_s
