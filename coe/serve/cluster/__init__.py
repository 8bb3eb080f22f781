"""The Ray Serve side: deployments, placement of requests on expert hosts, and updates of experts and policies."""
