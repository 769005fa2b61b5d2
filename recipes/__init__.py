"""The launchable stages."""
