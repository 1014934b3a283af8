"""What only a card can show, checked and measured on the card at hand: `expertmesh doctor --accelerator`.

`cases` are the ops of the table with inputs, run beside their reference by `checks`; `speeds` and `links` are measured,
`tokens` come of whole models. All of these run in processes of their own (`worker`, asked through `workers`), so that a
driver that crashes or hangs is a line of the report and not its end. `examine` puts the results together, `ticks`
judges them by what each of them shows, `profile` makes a card of the planner of them, `report` writes them down.
"""
