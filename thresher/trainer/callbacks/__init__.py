"""What happens beside a step: progress, records on disk, the report."""
