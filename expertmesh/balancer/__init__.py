"""Around the placement of experts: load and placement files of several engines, the published EPLB, figures, plots."""
