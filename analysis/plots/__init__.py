"""Figures as functions of plain data; from Python: `from analysis import plots; plots.draw_three_stages(summary)`."""

from .attention import draw_attention_map, draw_attention_scores, draw_measures, draw_stages_by_kind, draw_three_stages
from .exits import (
    draw_entropy_change,
    draw_exit_curves,
    draw_exit_curves_by_kind,
    draw_exit_depths,
    draw_kl,
    draw_policy_exit_layers,
    draw_text_entropy,
    draw_token_depths,
)
from .policies import (
    ExitExample,
    draw_exit_examples,
    draw_gate_curves,
    draw_policies_against_fixed_exits,
    first_exit_examples,
)
from .style import figure_style
