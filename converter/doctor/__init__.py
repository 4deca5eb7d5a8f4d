"""The doctor: what is wrong with a folder of weights, what a loader would do with it, and how to mend it."""

from __future__ import annotations

from dataclasses import dataclass

from converter.doctor.checks import run_checks
from converter.doctor.findings import SEVERITIES, Finding
from converter.doctor.goals import Choices
from converter.doctor.repair import Mending, plan_mending
from converter.doctor.undo import check_left
from converter.errors import LossyCast
from converter.models.faults import look
from converter.models.hub_cache import refuse_cache
from converter.models.inventory import Inventory
from converter.run.execute import run_plan
from converter.run.staging import recover
from converter.run.tasks import Progress
from converter.storage import Given, Place, place_of

__all__ = ["Choices", "Diagnosis", "Finding", "Mending", "diagnose", "finish_mending", "mend", "plan_mending"]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What a folder holds and what was found, the worst first."""

    inventory: Inventory
    findings: tuple[Finding, ...]

    @property
    def is_healthy(self) -> bool:
        return all(finding.severity == "note" for finding in self.findings)


def diagnose(path: Given, *, deep: bool = False) -> Diagnosis:
    """Look at a folder of weights; reads names, indexes and headers, and changes nothing.

    ``deep`` reads all values too, and holds shapes against the model's class, where its library is installed. Raises
    BadFile for a folder without weights, BadRequest for what is no folder.
    """
    inventory = look(path)
    found = run_checks(inventory)
    if deep:
        from converter.doctor.deep import run_deep_checks

        found += run_deep_checks(inventory)
    return Diagnosis(inventory, tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))))


def mend(path: Given, mending: Mending, *, progress: Progress | None = None) -> str:
    """Carry out what was planned, in one transaction; what it replaces is kept, for ``undo``.

    Gives what could not be cleared up, in words. Raises LossyCast where a variant to be made cannot hold the values,
    OutputRefused for a folder in the Hub's cache, and what ``run_plan`` raises.
    """
    folder = place_of(path)
    refuse_cache(folder)
    if mending.plan is not None:
        try:
            check_left(folder)
            return run_plan(mending.plan, progress=progress, request=_request(folder), keep=True).left_over
        except LossyCast as error:
            advice = "Make that variant with 'wconv recast' (--keep-fp32, --on-overflow), then mend the rest."
            raise LossyCast(error.where, error.problem, advice) from None
    return ""


def finish_mending(path: Given) -> bool:
    """Finish what a killed run of ``mend`` had begun to publish; True if there was such a thing."""
    folder = place_of(path)
    refuse_cache(folder)
    return recover(folder, _request(folder))


def _request(folder: Place) -> str:
    return repr(("mend", str(folder.absolute())))
