"""Tables with baselines, intervals, controls and reports."""
