"""What a training run leaves behind: records, tables, figures."""
