"""Trains a small GPT-2 on any text: the script that made the bundled language model.

    python training/train_lm.py --out my-lm                       # the text of Python's standard library
    python training/train_lm.py --text novels/ --out austen-lm    # a file, a directory, or hf:NAME

The story: learn a byte-level BPE on the text, pack it into one token stream, train with Muon for the matrices and AdamW for
the rest, and save an ordinary Hugging Face checkpoint directory. Learning rate: warm-up, a plateau, then a linear decay over
the last `--decay` of the steps, so a run can be resumed with more steps before its decay began. Every `--save-every` steps the whole state
is written; the same command again continues from there. Batches depend on the seed and the step number alone.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from saebench.errors import UserError
from saebench.lm.text import Text, builtin_text, load_text
from saebench.progress import progress, say

END_OF_TEXT = "<|endoftext|>"
Optimisers = list[torch.optim.Optimizer]
LOG_EVERY = 20
IGNORED = -100  # the label of a token that is not to be predicted


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="builtin", help="builtin, a file, a directory, or hf:NAME")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory to write")
    parser.add_argument("--vocab", type=int, default=2048, help="tokens in the vocabulary")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256, help="d_model")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--context", type=int, default=512, help="tokens in a context, the leading BOS included")
    parser.add_argument("--batch", type=int, default=8, help="contexts in a step")
    parser.add_argument("--repeats", type=int, default=1, help="contexts of a step that repeat a stretch of random tokens")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--warmup", type=int, default=50, help="steps of linear warm-up")
    parser.add_argument("--decay", type=float, default=0.4, help="share of the steps with falling learning rate, at the end")
    parser.add_argument("--lr-muon", type=float, default=0.015, help="learning rate of the block matrices")
    parser.add_argument("--lr-adam", type=float, default=3e-3, help="learning rate of embeddings, norms and biases")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="of the block matrices")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints of the whole state")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train_tokenizer(text: Text, vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with GPT-2's word pattern; `<|endoftext|>` (id 0) is both BOS and EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((document.text for document in text), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT
    )


def token_stream(text: Text, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All documents as one int64 vector, `<|endoftext|>` before each."""
    ids: list[int] = []
    for document in text:
        ids += [tokenizer.bos_token_id, *tokenizer(document.text, verbose=False)["input_ids"]]
    return torch.tensor(ids)


def split_stream(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, text: Text) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens to train on and tokens held out: modules of their own for the builtin text, else the last twentieth."""
    stream = token_stream(text, tokenizer)
    if args.text == "builtin":
        return stream, token_stream(builtin_text("held_out"), tokenizer)
    cut = len(stream) * 19 // 20
    return stream[:cut], stream[cut:]


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by Newton-Schulz iterations (Jordan et al. 2024), in float32.

    torch.optim.Muon does the iterations in bfloat16, which processors without bfloat16 units emulate 100 times slower.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(buffer, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[1] / p.shape[0]) ** 0.5)


def orthogonalise(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Push all singular values of a matrix towards one."""
    transposed = g.shape[0] > g.shape[1]
    x = (g.T if transposed else g) / (g.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if transposed else x


def optimisers(model: GPT2LMHeadModel, args: argparse.Namespace) -> Optimisers:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".h." in name)]
    return [
        Muon(matrices, lr=args.lr_muon, weight_decay=args.weight_decay),
        torch.optim.AdamW(others, lr=args.lr_adam, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def batch_at(step: int, stream: torch.Tensor, bos: int, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Contexts behind a BOS and their labels, both [batch, context], a function of seed and step alone.

    Most are windows of the stream. The first `--repeats` of a batch repeat a stretch of tokens drawn from all over it, and only
    the copies are to be predicted: what makes induction heads form within millions of tokens instead of billions.
    """
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    starts = torch.randint(0, len(stream) - args.context + 1, (args.batch, 1), generator=generator)
    windows = stream[starts + torch.arange(args.context - 1)]
    labels = windows.clone()
    for row in range(args.repeats):
        length = int(torch.randint(min(16, args.context // 4), args.context // 2, (), generator=generator))
        stretch = stream[torch.randint(0, len(stream), (length,), generator=generator)]
        windows[row] = labels[row] = stretch.repeat(-(-args.context // length))[: args.context - 1]
        labels[row, :length] = IGNORED
    column = torch.full((args.batch, 1), bos)
    return torch.cat([column, windows], dim=1), torch.cat([column, labels], dim=1)


def rate_at(step: int, args: argparse.Namespace) -> float:
    left = (args.steps - step) / max(1, args.decay * args.steps)
    return min(1.0, (step + 1) / max(1, args.warmup), left)


@torch.no_grad()
def nats_on(model: GPT2LMHeadModel, stream: torch.Tensor, bos: int, context: int) -> float:
    """Summed loss of every token of the stream, each predicted from at least half a context (where there is one)."""
    half = context // 2
    total = 0.0
    windows, counted = [], []
    for start in range(0, max(1, len(stream) - half + 1), half):
        window = stream[start : start + context - 1]
        windows.append(torch.cat([torch.tensor([bos]), window]))
        counted.append(0 if start == 0 else context - 1 - half)
    for window, skip in zip(windows, counted, strict=True):
        logits = model(window[None]).logits[0, skip:-1]
        total += torch.nn.functional.cross_entropy(logits.double(), window[skip + 1 :], reduction="sum").item()
    return total


@torch.no_grad()
def induction_scores(model: GPT2LMHeadModel, bos: int, length: int = 60) -> torch.Tensor:
    """How much each head attends, on random tokens that are repeated, to the token behind the first copy: [layers, heads]."""
    generator = torch.Generator().manual_seed(0)
    once = torch.randint(1, model.config.vocab_size, (8, min(length, model.config.n_positions // 2 - 1)), generator=generator)
    ids = torch.cat([torch.full((len(once), 1), bos), once, once], dim=1)
    model.set_attn_implementation("eager")  # the fused attention does not give its pattern
    patterns = model(ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    rows = torch.arange(once.shape[1] + 1, 2 * once.shape[1] + 1)
    return torch.stack([pattern[:, :, rows, rows - once.shape[1] + 1].mean((0, 2)) for pattern in patterns])


def save_state(path: Path, model: GPT2LMHeadModel, opts: Optimisers, step: int) -> None:
    tensors = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    for number, opt in enumerate(opts):
        for index, state in opt.state_dict()["state"].items():
            tensors |= {f"optimiser{number}/{index}/{key}": torch.as_tensor(value) for key, value in state.items()}
    temporary = path.with_suffix(".tmp")
    save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata={"step": str(step)})
    temporary.replace(path)


def load_state(path: Path, model: GPT2LMHeadModel, opts: Optimisers) -> int:
    with safe_open(path, "pt") as f:
        for name, p in model.named_parameters():
            p.data.copy_(f.get_tensor(f"model/{name}"))
        for number, opt in enumerate(opts):
            state: dict = {}
            for key in f.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                if key.startswith(f"optimiser{number}/"):
                    _, index, field = key.split("/")
                    state.setdefault(int(index), {})[field] = f.get_tensor(key)
            opt.load_state_dict(opt.state_dict() | {"state": state})
        return int(f.metadata()["step"])


def main() -> None:
    args = arguments()
    text = load_text(args.text)
    next(iter(text))  # wrong or empty input is found before anything is written
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    if (args.out / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
    else:
        tokenizer = train_tokenizer(text, args.vocab)
        tokenizer.save_pretrained(args.out)
    bos = tokenizer.bos_token_id
    stream, held_out = split_stream(args, tokenizer, text)
    if len(stream) < args.context:
        raise UserError(f"the text has {len(stream)} tokens, less than one context of {args.context}: use more text or --context")
    held_bytes = len(tokenizer.decode(held_out, skip_special_tokens=True).encode())
    say(f"{len(stream):,} training tokens, {len(held_out):,} held out; {held_bytes / len(held_out):.2f} bytes a token")

    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=args.context, n_embd=args.width, n_layer=args.layers, n_head=args.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=bos, eos_token_id=bos,
        activation_function="gelu_pytorch_tanh",
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    train(model, stream, bos, args)
    model.eval()
    bits = nats_on(model, held_out, bos, args.context) / math.log(2) / held_bytes
    model.save_pretrained(args.out)
    scores = induction_scores(model, bos)
    layer, head = divmod(int(scores.argmax()), scores.shape[1])
    say(f"held-out: {bits:.4f} bits per byte; induction score {scores.max():.3f} (layer {layer}, head {head}); wrote {args.out}")


def train(model: GPT2LMHeadModel, stream: torch.Tensor, bos: int, args: argparse.Namespace) -> None:
    """All steps that are left, with the state saved now and then."""
    opts, rates = optimisers(model, args), (args.lr_muon, args.lr_adam)
    state_file, log_file = args.out / "training_state.safetensors", args.out / "training_log.jsonl"
    first = load_state(state_file, model, opts) if state_file.exists() else 0
    say(f"{model.num_parameters():,} parameters; step {first} of {args.steps}")
    losses: list[torch.Tensor] = []
    with progress("train", args.steps * args.batch * args.context, "tokens", first * args.batch * args.context) as report:
        for step in range(first, args.steps):
            ids, labels = batch_at(step, stream, bos, args)
            logits = model(ids).logits[:, :-1]
            losses_T = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
            )
            (losses_T.sum() / (labels[:, 1:] != IGNORED).sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for opt, rate in zip(opts, rates, strict=True):
                opt.param_groups[0]["lr"] = rate * rate_at(step, args)
                opt.step()
                opt.zero_grad()
            losses.append(losses_T.detach().view(len(ids), -1)[args.repeats :].mean())  # of the text alone
            note, done = "", step + 1
            if done % LOG_EVERY == 0 or done == args.steps:
                mean = torch.stack(losses).mean().item()
                note, losses = f"loss {mean:.4f}", []
                with log_file.open("a") as log:
                    log.write(json.dumps({"step": done, "tokens": done * ids.numel(), "loss": round(mean, 4)}) + "\n")
            if done % args.save_every == 0 or done == args.steps:
                save_state(state_file, model, opts, done)
            report(ids.numel(), note)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from the last saved step") from None
