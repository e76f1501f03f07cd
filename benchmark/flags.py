"""The codes of trust flags, what each means for a number, and what to try next; the one place that says it."""

from __future__ import annotations

from dataclasses import dataclass

from moebench.schema import OVERSTATED_RA

BLACK_BOX_WINS = "black-box-wins"
FEWER_STEPS_WIN = "fewer-steps-win"
SMALLER_EPS_WINS = "smaller-eps-wins"
STEPS_DO_NOT_HELP = "steps-do-not-help"
EPS_DOES_NOT_HELP = "eps-does-not-help"
ADAPTIVE_WINS = "adaptive-wins"
ZERO_GRADIENTS = "zero-gradients"
STANDS_EVERYWHERE = "stands-everywhere"
RANDOM_FORWARD = "random-forward"
BATCH_DEPENDENT = "batch-dependent"
TRAIN_MODE = "train-mode"


@dataclass(frozen=True)
class Meaning:
    """What a flag says about the numbers beside it, and what its reader can do."""

    meaning: str
    advice: str


MEANINGS: dict[str, Meaning] = {
    OVERSTATED_RA: Meaning(
        "every attack on a part of the model is an attack on the model, so RA is too high; RA-worst is not",
        "quote RA-worst; run --attack moe-adaptive",
    ),
    BLACK_BOX_WINS: Meaning(
        "an attack without gradients finds what gradients do not: they point the wrong way, and RA is too high",
        "for an MoE --attack moe-adaptive; else attack a differentiable stand-in of the part that blocks gradients",
    ),
    FEWER_STEPS_WIN: Meaning(
        "a longer attack that breaks less follows gradients that mislead it; the lower accuracy is nearer the truth",
        "--attack square and apgd-t; for a random model --eot N",
    ),
    SMALLER_EPS_WINS: Meaning(
        "every image of the smaller ball is in the larger one, so the accuracy at the larger radius is too high",
        "--attack autoattack or square at the larger radius",
    ),
    STEPS_DO_NOT_HELP: Meaning(
        "following the gradient does not raise the loss, so attacks by gradient measure little",
        "--attack square; attack a differentiable stand-in of the model; for a random model --eot N",
    ),
    EPS_DOES_NOT_HELP: Meaning(
        "the larger ball holds the smaller one, so the attack fails for another reason than robustness",
        "--attack square or autoattack at both radii",
    ),
    ADAPTIVE_WINS: Meaning(
        "the plain attack does not see the routing (hard selection has no gradient), and its RA is too high",
        "quote RA-worst, or the RA of moe-adaptive; do not quote the plain attack alone",
    ),
    ZERO_GRADIENTS: Meaning(
        "where the gradient of the cross-entropy vanishes, attacks that follow it stand still; the model is not robust "
        "there, it is unattacked",
        "losses that do not saturate (--attack apgd-dlr,apgd-t), --attack square; take rounding, clipping or a large "
        "factor on the logits out of the forward pass",
    ),
    STANDS_EVERYWHERE: Meaning(
        "at that radius the image of another class is inside the ball, so robustness is 0, and the attack misses it",
        "--attack autoattack, or square alone; distrust every RA by gradients of this model",
    ),
    RANDOM_FORWARD: Meaning(
        "a verdict is one draw: the judge decides by a single forward pass, so a sample may fall by luck, and the "
        "gradients of one draw mislead attacks",
        "evaluate --eot N averages gradients over N draws; repeat with other seeds; compare with the noise taken out",
    ),
    BATCH_DEPENDENT: Meaning(
        "robustness of a single image is not defined: verdicts hang on the batch size and on the other images",
        "use running statistics in BatchNorm and an expert capacity that drops nothing; see whether --batch-size 1 "
        "agrees",
    ),
    TRAIN_MODE: Meaning(
        "what was measured is not the model that would be deployed: dropout drops, BatchNorm uses and updates batch "
        "statistics",
        "leave the modes to eval(); remove .train() and training=True from the forward pass",
    ),
}


def meaning(code: str) -> Meaning | None:
    """What a code says; None for a code of another version of moebench."""
    return MEANINGS.get(code)
