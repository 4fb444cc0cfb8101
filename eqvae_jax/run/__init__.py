"""What `main` can train, one module a task: `preflight(config)` checks without JAX, `train(config, workdir)` trains."""
