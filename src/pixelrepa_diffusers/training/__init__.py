"""Library of the training script: arguments, data, model building, the optimizer step, checkpoints, reports, exports."""
