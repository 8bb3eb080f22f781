"""Where retries are logged."""


def are_logged() -> None:
    """Let stamina log retries by `logging`: where structlog is installed, it would print them to stdout."""
    from stamina.instrumentation import LoggingOnRetryHook, get_on_retry_hooks, set_on_retry_hooks

    if any(hook.__module__.endswith("._structlog") for hook in get_on_retry_hooks()):
        set_on_retry_hooks([LoggingOnRetryHook])
