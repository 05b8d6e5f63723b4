"""Tune a sparse pipeline with LoRA: python scripts/lora_t2v.py.

Low-rank adapters on the self-attention of the bundled model learn, by flow matching on the clips it
was trained on, to do with a fraction of the pairs. Prints the loss on clips that are not trained on
and the likeness of generated clips to dense ones, before and after, and saves the adapters, which
``pipe.load_lora_weights`` reads.

Letters: B batch, C latent channels, D text width; latents are (B, C, t, h, w).
"""

import argparse
from pathlib import Path

import torch
from diffusers import WanPipeline
from peft import LoraConfig, get_peft_model_state_dict
from t2v.checkpoint import learning_rate
from t2v.data import Clips, fetch_items, held_out_prompts
from t2v.flow import flow_loss
from t2v.vae import encode_moments, normalise
from tqdm import tqdm

import vidattn
from vidattn.commands.output import writable_folder
from vidattn.flags.values import positive_int
from vidattn.measure import psnr

TARGETS = r".*attn1\.(to_q|to_k|to_v|to_out\.0)"
# the last of the clips, which are not trained on
NUM_TEST_CLIPS = 8


class Velocity(torch.nn.Module):
    """The transformer of a pipeline as ``flow_loss`` calls it."""

    def __init__(self, transformer: torch.nn.Module):
        super().__init__()
        self.transformer = transformer

    def forward(self, latents, sigma, embeddings):
        """Velocity (B, C, t, h, w) at noise level sigma (B,) under text (B, 512, D)."""
        return self.transformer(latents, sigma * 1000, embeddings, return_dict=False)[0]


def main() -> None:
    """Encode clips, tune, compare."""
    args = parse()
    torch.manual_seed(args.seed)
    out = writable_folder(args.out, "--out")
    pipe = WanPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    options = {"density": args.density, "near": 0, "sink": False}
    dense = [generate(pipe, i, args) for i in range(args.prompts)]
    latents, texts = encode(pipe, args)
    pipe.transformer.requires_grad_(False)
    pipe.transformer.add_adapter(
        LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=TARGETS)
    )
    show("before", pipe, options, dense, latents, texts, args)
    tune(pipe, options, latents, texts, args)
    show("after", pipe, options, dense, latents, texts, args)
    pipe.save_lora_weights(out, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    print(f"wrote {out / 'pytorch_lora_weights.safetensors'}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--density", type=float, default=0.25, help="share of the pairs read")
    parser.add_argument("--rank", type=positive_int, default=8)
    parser.add_argument("--steps", type=positive_int, default=300, help="of training")
    parser.add_argument("--batch", type=positive_int, default=2)
    parser.add_argument("--peak", type=float, default=3e-4, help="learning rate")
    parser.add_argument("--clips", type=positive_int, default=64, help="encoded, and trained on")
    parser.add_argument("--prompts", type=positive_int, default=2, help="clips to compare")
    parser.add_argument("--frames", type=positive_int, default=17)
    parser.add_argument("--side", type=positive_int, default=128, help="height and width")
    parser.add_argument("--sampling-steps", type=positive_int, default=8)
    parser.add_argument("--shift", type=float, default=5.0, help="of the noise levels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="assets/tiny-t2v")
    parser.add_argument("--data", default="runs/t2v/data")
    parser.add_argument("--out", type=Path, default=Path("runs/lora_t2v"))
    return parser.parse_args()


def sparse(pipe: WanPipeline, options: dict, dense_steps: float = 0):
    """The pipeline with its first layer dense and the others radial, within a with block."""
    return vidattn.patch(pipe, "radial", dense_layers=1, dense_steps=dense_steps, **options)


@torch.no_grad()
def encode(pipe: WanPipeline, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (clips, C, t, h, w), and the text (clips, 512, D) of each."""
    fetch_items(args.data)
    clips, size = Clips(args.data, "train", args.seed), (args.frames, args.side, args.side)
    latents, texts = [], []
    for index in tqdm(range(args.clips + NUM_TEST_CLIPS), desc="encoding"):
        clip, scene = clips.sample(index, size)
        mean = encode_moments(pipe.vae, clip[None]).chunk(2, dim=1)[0]
        latents.append(normalise(pipe.vae, mean[0]))
        texts.append(pipe.encode_prompt(scene.caption, do_classifier_free_guidance=False)[0][0])
    return torch.stack(latents), torch.stack(texts)


def tune(pipe, options: dict, latents, texts, args: argparse.Namespace) -> None:
    """Train the adapters on the loss of the sparse model."""
    model = Velocity(pipe.transformer.train())
    adapters = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(adapters, weight_decay=0.0)
    print(f"{sum(x.numel() for x in adapters):,} parameters in {len(adapters)} matrices")
    plan = {"peak": args.peak, "total": args.steps, "warmup": args.steps // 20}
    plan["decay"] = args.steps // 2
    source = torch.Generator().manual_seed(args.seed)
    with sparse(pipe, options), tqdm(range(args.steps), desc="tuning") as bar:
        for step in bar:
            some = torch.randint(args.clips, (args.batch,), generator=source)
            loss = flow_loss(model, latents[some], (texts[some],), args.shift, step)
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, **plan)
            optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.4f}")
    pipe.transformer.eval()


@torch.no_grad()
def show(when: str, pipe, options: dict, dense, latents, texts, args: argparse.Namespace) -> None:
    """Print the loss on clips not trained on, and the PSNR of generated clips."""
    model, tests = Velocity(pipe.transformer), range(args.clips, len(latents))
    with sparse(pipe, options):
        losses = [
            flow_loss(model, latents[i : i + 1], (texts[i : i + 1],), args.shift, seed)
            for i in tests
            for seed in range(10**6, 10**6 + 4)
        ]
    with sparse(pipe, options, dense_steps=0.1):
        clips = [generate(pipe, i, args) for i in range(args.prompts)]
    likeness = [psnr(clip, other) for clip, other in zip(clips, dense)]
    print(
        f"{when}: loss {torch.stack(losses).mean():.4f}, "
        f"PSNR to dense {sum(likeness) / len(likeness):.2f} dB"
    )


def generate(pipe: WanPipeline, number: int, args: argparse.Namespace) -> torch.Tensor:
    """(F, 3, H, W) the clip of a held-out prompt."""
    return pipe(
        held_out_prompts()[number].caption,
        num_frames=args.frames,
        height=args.side,
        width=args.side,
        num_inference_steps=args.sampling_steps,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(args.seed),
        output_type="pt",
    ).frames[0]


if __name__ == "__main__":
    main()
