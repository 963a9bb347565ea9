"""Memory is chosen: schedules of recomputation, the engine that runs them, and the planner that picks one."""

from sret_scale.memory.apply import apply_recomputation, apply_schedules
from sret_scale.memory.config import SCHEDULES, MemoryConfig, schedule_for
from sret_scale.memory.planning.ledger import Ledger, account
from sret_scale.memory.planning.planner import Plan, Prepared, plan_for, predict_activations, prepare_memory
from sret_scale.memory.planning.unequal_chains import plan_chain
from sret_scale.memory.recompute import run_chain
from sret_scale.memory.schedule import Schedule

__all__ = [
    "SCHEDULES",
    "Ledger",
    "MemoryConfig",
    "Plan",
    "Prepared",
    "Schedule",
    "account",
    "apply_recomputation",
    "apply_schedules",
    "plan_chain",
    "plan_for",
    "predict_activations",
    "prepare_memory",
    "run_chain",
    "schedule_for",
]
