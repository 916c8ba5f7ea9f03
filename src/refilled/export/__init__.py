"""Students as files that other programs run: ONNX, torch.export programs, and weights with a configuration."""
