"""`vidattn list`: methods, everything about one of them, and what else is known."""

from __future__ import annotations

import argparse

import yaml

from vidattn.catalog import PRESETS, Entry, describe, list_names, list_presets
from vidattn.choice import Choice
from vidattn.support.config import describe_type
from vidattn.support.resources import resource
from vidattn.support.table import fill, table

# tokens that full attention is timed at, with heads of 64
LENGTHS = (256, 512, 1024, 2048)
EXPLAINED = (
    "The cpp engine, head dim 64. Dense calls run on it where it is at least 1.05 times as fast, "
    "else on PyTorch's attention. The figures were measured once, and are kept."
)


def run(args: argparse.Namespace) -> None:
    """Print what is asked for."""
    if args.models:
        _show_models()
    elif args.presets:
        _show_presets()
    elif args.engines:
        _show_engines()
    elif args.policies:
        _show_options(args.policies, "cache")
    elif args.policies is not None:
        _show_names("cache", "policy", "what it does")
        print(
            "\nvidattn list --policies NAME explains the options; vidattn stream --policy takes "
            "them."
        )
    elif args.guides:
        _show_options(args.guides, "guides")
    elif args.guides is not None:
        _show_names("guides", "guide", "where it leads")
        print(
            "\nvidattn list --guides NAME explains the options; vidattn generate --guide takes "
            "them."
        )
    elif args.method:
        _show_method(args.method)
    else:
        _show_names("methods", "method", "what it keeps")
        print("\nvidattn list METHOD explains the options, vidattn draw METHOD makes a picture.")


def _show_names(home: str, word: str, does: str) -> None:
    head = [word, does, "options"]
    entries = [describe(name, home) for name in list_names(home)]
    rows = [[entry.name, entry.summary, " ".join(entry.options)] for entry in entries]
    print(table(head, rows, prose=head[1:]))


def _show_models() -> None:
    from vidattn.pipelines.family import families

    refused = [family for family in families() if isinstance(family.refuse, str)]
    known = [family for family in families() if family not in refused]
    print("vidattn can patch pipelines of these transformers")
    for name in sorted(name for family in known for name in family.models):
        print(f"  {name}")
    print("\nand refuses these")
    for family in refused:
        print(f"  {', '.join(family.models)}:\n    {family.refuse}")


def _show_presets() -> None:
    head = ["preset", "transformer", "dense\nlayers", "dense\nsteps", "methods"]
    rows = []
    for name in list_presets():
        text = resource(f"{PRESETS}/{name}.yaml").read_text(encoding="utf-8")
        given = yaml.safe_load(text)
        methods = [Choice(x["method"], x.get("options") or {}).label for x in given["rules"]]
        guards = [str(given[key]) for key in ("dense_layers", "dense_steps")]
        cells = [given["model"]["transformer"], *guards, "\n".join(dict.fromkeys(methods))]
        rows.append([name, *cells])
    print(table(head, rows))
    print(
        "\nUsed as --schedule NAME, or vidattn.patch(pipe, schedule=NAME). Sources stand in\n"
        f"{resource(PRESETS)}"
    )


def _show_engines() -> None:
    import torch

    from vidattn.kernels.engines.exact import speeds
    from vidattn.runs.engines import DTYPES, states

    rows = [[name, fill(state, 60)] for name, state in states().items()]
    print(table(["engine", "on this machine"], rows))
    print(f"\nFull attention on {torch.get_num_threads()} threads of the CPU, times PyTorch's:")
    head = ["dtype", "direction", *(f"{tokens:,} tokens" for tokens in LENGTHS)]
    found = [
        [name, words, *(f"{x:.2f}x" for x in speeds(getattr(torch, name), has_gradient, LENGTHS))]
        for name in DTYPES
        for has_gradient, words in ((False, "forward"), (True, "and backward"))
    ]
    print(table(head, found))
    print(fill(EXPLAINED))


def _show_method(name: str) -> None:
    entry = describe(name)
    _show_about(entry)
    print({
        True: "The plan reads queries and keys.",
        False: "The plan is the same for every content.",
        None: "The plan is the same for every content, unless an option says that it is read.",
    }[entry.reads_content])  # fmt: skip
    if not entry.options:
        print("\nIt has no options.")
        return
    print(f"\n{_options_table(entry)}")
    defaults = {option.name: option.default for option in entry.options.values()}
    option = next(x for x in defaults if x == "density" or defaults[x] != "none")
    example = "0.3" if option == "density" else defaults[option]
    print(
        f"\nWritten --{option.replace('_', '-')} {example}, or inside the method as "
        f"{name}:{option}={example}."
    )


def _show_options(name: str, home: str) -> None:
    entry = describe(name, home)
    _show_about(entry)
    print(_options_table(entry))


def _show_about(entry: Entry) -> None:
    for paragraph in (f"{entry.name}: {entry.summary}", *entry.about.split("\n\n")):
        print(f"{fill(paragraph)}\n")


def _options_table(entry: Entry) -> str:
    head = ["option", "type", "default", "meaning"]
    rows = [
        [option.name, describe_type(option.hint), option.default, option.meaning]
        for option in entry.options.values()
    ]
    return table(head, rows, prose=["type", "meaning"])
