"""Once per rank: groups, placements, the model, its checkpoints and the generation loop."""
