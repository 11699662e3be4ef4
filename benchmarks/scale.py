"""Memory and time of a training step by arithmetic, for Qwen2.5's shapes and any number of GPUs.

    python benchmarks/scale.py                                 the tables of docs/scale.md
    python benchmarks/scale.py --ranks 16 --tokens 16384       another machine

States, activations and operations are checked against measured small models, the peak against one H100, by
tests/test_scale.py. Not counted: the allocator's slack, NCCL's buffers, CUDA's context (0.5 GB and more). A step's time
is that of its matrix products at --tflops, the most that one GPU can do: a lower bound.
"""

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_width: int  # key-value heads x their width
    vocab: int
    tied: bool = False

    @property
    def layer(self) -> int:
        """Weights of a layer's matrix products."""
        h = self.hidden
        return 2 * h * h + 2 * h * self.kv_width + 3 * h * self.intermediate

    @property
    def parameters(self) -> int:
        """All of them: with the products' biases (of q, k, v), the norms, embeddings and output matrix."""
        small = self.hidden + 2 * self.kv_width + 2 * self.hidden
        heads = (1 if self.tied else 2) * self.vocab * self.hidden
        return self.layers * (self.layer + small) + self.hidden + heads

    def config(self) -> dict:
        """Settings of a Qwen2 of this shape: `load_policy`'s from_config."""
        return dict(
            model_type="qwen2", hidden_size=self.hidden, intermediate_size=self.intermediate, vocab_size=self.vocab,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, tie_word_embeddings=self.tied,
            num_key_value_heads=self.kv_width * self.heads // self.hidden, max_position_embeddings=32768,
            eos_token_id=1, pad_token_id=0,
        )  # fmt: skip


MODELS = {
    "1.5B": Shape(28, 1536, 8960, 12, 256, 151936, tied=True),
    "7B": Shape(28, 3584, 18944, 28, 512, 152064),
    "32B": Shape(64, 5120, 27648, 40, 1024, 152064),
}


def state_bytes(shape: Shape, ranks: int) -> float:
    """Weights, gradients and AdamW's two moments in float32, on each rank."""
    return 16 * shape.parameters / ranks


def gathered_bytes(shape: Shape, ranks: int) -> float:
    """What FSDP2 holds whole in bf16: two layers (one ahead), and embeddings and output matrix; one rank holds all."""
    heads = (1 if shape.tied else 2) * shape.vocab * shape.hidden
    return 2 * (min(2, shape.layers) * shape.layer + heads) if ranks > 1 else 2 * shape.parameters


def head_bytes(shape: Shape, responses: int, *, kept: bool = True) -> float:
    """What log-probs and their gradient take beside the activations: a tile of float32 logits, the head's gradient and,
    if `kept`, 2 bytes a logit (common/logprobs.py: where at most half of the free memory goes into them)."""
    return 4 * 2**27 + 2 * shape.vocab * shape.hidden + (2 * responses * shape.vocab if kept else 0)


def root_bytes(shape: Shape) -> float:
    """At the end of a backward pass: the gradient of embeddings and head in bf16, and as a float32 sum over ranks."""
    return 6 * (1 if shape.tied else 2) * shape.vocab * shape.hidden


def peak_bytes(shape: Shape, ranks: int, tokens: int, responses: int, *, checkpointing: bool, kept=True) -> float:
    """Peak memory of an update whose micro-batches have `tokens` tokens, `responses` of them predicted.

    The head, the layer that is computed again and the root's gradient come one after the other: the largest counts."""
    activations = activation_bytes(shape, tokens, checkpointing=checkpointing)
    saved = 2 * shape.layers * tokens * shape.hidden if checkpointing else activations
    moments = (saved + head_bytes(shape, responses, kept=kept), activations, root_bytes(shape))
    return state_bytes(shape, ranks) + gathered_bytes(shape, ranks) + max(moments)


def activation_bytes(shape: Shape, tokens: int, *, checkpointing: bool, element: int = 2) -> float:
    """What the backward pass of `tokens` tokens of a micro-batch keeps, for elements of `element` bytes (2: bf16).

    With checkpointing: the input of every layer, and all of the one that is being computed again."""
    e, h, f = element, shape.hidden, shape.intermediate
    # norms: 2 x (their input and its normalisation, in float32 and in e) ...; MLP: gate, silu, up, product
    inside = (6 * e + 8) * h + 2 * e * shape.kv_width + 4 * e * f + 4 * shape.heads + 8
    return tokens * (shape.layers * e * h + inside if checkpointing else shape.layers * inside)


def update_flops(shape: Shape, tokens: int, responses: int, *, checkpointing: bool = True) -> float:
    """Operations of an update's matrix products: the body forward, again (but for each layer's last product) and
    backward, and the head's on the response tokens (8 instead of 6 operations where it keeps nothing). Attention's
    own, which grow with the lengths, are not in it."""
    again = 2 * (shape.layer - shape.hidden * shape.intermediate) if checkpointing else 0
    return shape.layers * (6 * shape.layer + again) * tokens + 6 * responses * shape.vocab * shape.hidden


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], help="of a micro-batch")
    parser.add_argument("--rows", type=int, default=1024, help="sequences of an update")
    parser.add_argument("--tflops", type=float, default=989, help="dense bf16 of one GPU (H100, H200: 989)")
    options = parser.parse_args()
    lengths = [f"{t:,} tokens" for t in options.tokens]
    print("| model | GPUs | states | gathered | root's gradient | "
          + " | ".join(f"activations, {t} | peak, {t} | the same, nothing kept" for t in lengths) + " |")
    print("|---|---|---|---|---|" + "---|" * (3 * len(options.tokens)))
    for name, shape in MODELS.items():
        for ranks in options.ranks:
            cells = [state_bytes(shape, ranks), gathered_bytes(shape, ranks), root_bytes(shape)]
            for t in options.tokens:
                cells.append(activation_bytes(shape, t, checkpointing=True))
                cells += [peak_bytes(shape, ranks, t, t, checkpointing=True, kept=kept) for kept in (True, False)]
            print(f"| {name} | {ranks} | {' | '.join(f'{x / 1e9:.1f}' for x in cells)} |")
    print(f"\n| model | tokens a sequence | operations of the updates of {options.rows:,} sequences | "
          + " | ".join(f"{r} GPU{'s' * (r > 1)}" for r in options.ranks) + " |")
    print("|---|---|---|" + "---|" * len(options.ranks))
    for name, shape in MODELS.items():
        for length in options.tokens:
            work = update_flops(shape, options.rows * length, options.rows * length)
            seconds = " | ".join(f"{work / (r * options.tflops * 1e12):,.0f} s" for r in options.ranks)
            print(f"| {name} | {length:,} | {work:.1e} | {seconds} |")


if __name__ == "__main__":
    main()
