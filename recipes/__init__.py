"""The recipes that come with prunekit."""
