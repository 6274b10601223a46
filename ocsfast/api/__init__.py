"""What a user calls: `step`, `attach`, `inspect`, `save`, `load`, and the pruner behind them."""
