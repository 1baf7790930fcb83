"""The rollout: manifests, image, rules, dashboard, and the sidecar's life in a pod."""
