"""What a finished run says of itself, written down from the curve it is meant to have had."""

from __future__ import annotations

from typing import Any


def run(method: str, curve: list[float], test: float = 0.5, every: int = 10) -> dict[str, Any]:
    history = [
        {"step": i * every, "examples": i * every * 4, "seconds": float(i), "accuracy": score}
        for i, score in enumerate(curve)
    ]
    best = max(curve)
    metrics = {
        "metric": "accuracy",
        "dev": {"accuracy": best},
        "test": {"accuracy": test},
        "best_step": curve.index(best) * every,
        "examples": history[-1]["examples"],
        "seconds": history[-1]["seconds"],
    }
    return {"method": method, "metrics": metrics, "history": history}
