"""Training a model given as layers on pipelines side by side, on any number of ranks: everstep.Pipeline."""

from __future__ import annotations

from everstep.pipeline._ledger import Verdict, verify
from everstep.pipeline._planner import PlanRefusedError
from everstep.pipeline.engine import Pipeline, Report

__all__ = ["Pipeline", "PlanRefusedError", "Report", "Verdict", "verify"]
