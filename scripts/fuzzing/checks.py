"""Every kind of case with what is checked of it."""

import torch
from fuzzing import attending, planning, refusals
from fuzzing.cases import Case, Refused, Wrong
from fuzzing.inputs import make_inputs
from fuzzing.oracle import TOLERANCE, attention, read_plan
from fuzzing.plans import make_plan
from fuzzing.states import forget

import vidattn

# what is said where there are no samples
EMPTY = "at least one sample"


def check_compiled(case: Case) -> None:
    """``attend`` is traced as one graph, and gives what it gives otherwise."""
    inputs = make_inputs(case)
    plan = make_plan(case, inputs)
    given = (inputs.q, inputs.k, inputs.v)

    def call(q, k, v):
        return vidattn.attend(
            q, k, v, plan, scale=case.scale, key_mask=inputs.key_mask, backend=case.engine
        )

    torch.compiler.reset()
    out = torch.compile(call, backend="eager", fullgraph=True)(*given)
    truth = read_plan(plan, case.batch, case.heads)
    scale = case.dim**-0.5 if case.scale is None else case.scale
    answer = attention(*given, truth, scale, inputs.key_mask)
    attending.compare(answer, {"out": out}, TOLERANCE[case.torch_dtype])


CHECKS = {
    "attend": attending.check_attend,
    "pattern": planning.check_pattern,
    "content": planning.check_content,
    "neighborhood_attention": attending.check_neighborhood,
    "compile": check_compiled,
    "refusal": refusals.check_refused,
}


def check(case: Case) -> str | None:
    """What is wrong with a case, in words that shrinking keeps to; None where nothing is.

    Raises:
        Refused: the case asks for what cannot be had, and was told so.
    """
    forget()
    try:
        CHECKS[case.kind](case)
    except Refused:
        raise
    except Wrong as wrong:
        return str(wrong)
    except Exception as error:
        if case.batch == 0 and isinstance(error, ValueError) and EMPTY in str(error):
            raise Refused(str(error)) from None
        return f"{type(error).__name__}: {error}"
    return None


def symptom(complaint: str) -> str:
    """A complaint without its figures: two cases with the same one fail alike."""
    return "".join(x for x in complaint.partition(": ")[0] if not x.isdigit())[:80]
