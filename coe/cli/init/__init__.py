"""`coe init`: an experts file and a configuration for models that exist."""
