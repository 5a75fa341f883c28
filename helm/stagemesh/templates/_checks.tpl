{{/* Values that contradict each other: refused with both, and the fix. */}}
{{- define "stagemesh.checks" -}}
{{- $stages := len .Values.stages }}
{{- with .Values.coordinator.settings.layer_partition }}
{{- if ne (len .) $stages }}
{{- fail (printf "coordinator.settings.layer_partition names %d stages, `stages` has %d: give one number of layers for each" (len .) $stages) }}
{{- end }}
{{- end }}
{{- range $what := list "stages" "standbys" }}
{{- range $i, $stage := index $.Values $what }}
{{- $gpus := dig "resources" "limits" "nvidia.com/gpu" "" $stage | toString }}
{{- $ranks := int (default 1 $stage.tensorParallelSize) }}
{{- if and $gpus (ne (int $gpus) $ranks) }}
{{- fail (printf "%s[%d]: tensorParallelSize is %d and resources.limits has %s of nvidia.com/gpu: each rank takes one GPU, make them equal" $what $i $ranks $gpus) }}
{{- end }}
{{- if and (not $gpus) (eq (dig "settings" "device" "auto" $stage) "cuda") }}
{{- fail (printf "%s[%d]: settings.device is cuda and resources.limits asks for no nvidia.com/gpu: ask for %d" $what $i $ranks) }}
{{- end }}
{{- end }}
{{- end }}
{{- $hub := default dict .Values.model.hub }}
{{- if and $hub.id (or .Values.model.path .Values.model.volume) }}
{{- fail (printf "model.hub.id %s and model.path or model.volume are both set: give one" $hub.id) }}
{{- end }}
{{- if and $hub.revision (not $hub.id) }}
{{- fail (printf "model.hub.revision %s is set and model.hub.id is not: name the model" $hub.revision) }}
{{- end }}
{{- with .Values.model }}
{{- if and .path (not .volume) (hasPrefix (printf "%s/" .mountPath) (printf "%s/" .path)) }}
{{- fail (printf "model.path %s is under model.mountPath and there is no model.volume: say where the files come from" .path) }}
{{- end }}
{{- if and .volume (not .path) }}
{{- fail "model.volume is set and model.path is not: name the checkpoint's directory in the pods" }}
{{- end }}
{{- end }}
{{- if and .Values.coordinator.lease.enabled (not .Values.serviceAccount.create) (not .Values.serviceAccount.name) }}
{{- fail "coordinator.lease.enabled gives the service account a Role, and without serviceAccount.create that is `default`, which every pod of the namespace has: name one in serviceAccount.name" }}
{{- end }}
{{- if and .Values.apiKey.value .Values.apiKey.existingSecret }}
{{- fail "apiKey.value and apiKey.existingSecret are both set: give one" }}
{{- end }}
{{- end }}
