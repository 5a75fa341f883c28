{{/* What every pod and container has. */}}

{{/* Takes (dict "root" $ "pod" the service's values). */}}
{{- define "stagemesh.podSpec" -}}
serviceAccountName: {{ include "stagemesh.serviceAccount" .root }}
automountServiceAccountToken: false
# Variables such as STAGEMESH_PORT, which Kubernetes would make from Services' names, are settings here.
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .root.Values.securityContext.runAsUser }}
  runAsGroup: {{ .root.Values.securityContext.runAsGroup }}
  {{- if or .ownsVolume (include "stagemesh.hubId" .root) }}
  fsGroup: {{ .root.Values.securityContext.runAsGroup }}
  fsGroupChangePolicy: OnRootMismatch
  {{- end }}
  seccompProfile:
    type: RuntimeDefault
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.topologySpreadConstraints }}
topologySpreadConstraints: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .pod.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end }}

{{- define "stagemesh.podAnnotations" -}}
checksum/settings: {{ .settings | sha256sum }}
{{- with .pod.podAnnotations }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Takes (dict "root" $ "command" the command's name "pod" the service's values). */}}
{{- define "stagemesh.container" -}}
image: {{ include "stagemesh.image" . | quote }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
command: [stagemesh]
args: [{{ .command }}, --config, /etc/stagemesh/settings.yaml]
# A wrong setting or a model that does not fit is said in the last log lines: kubectl describe shows them.
terminationMessagePolicy: FallbackToLogsOnError
securityContext: {{- include "stagemesh.containerSecurity" . | nindent 2 }}
{{- with .pod.resources }}
resources: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "stagemesh.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "stagemesh.env" -}}
- name: STAGEMESH_LOG_LEVEL
  value: {{ .root.Values.logLevel }}
# Libraries that keep caches find a place where they may write, whoever the user is.
- name: HOME
  value: /tmp
{{- if include "stagemesh.hubId" .root }}
{{- with .root.Values.model.hub }}
- name: HF_HOME
  value: {{ .cache.mountPath | quote }}
{{- if .endpoint }}
- name: HF_ENDPOINT
  value: {{ .endpoint | quote }}
{{- end }}
{{- if .tokenSecret.name }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ .tokenSecret.name }}, key: {{ .tokenSecret.key }}}
{{- end }}
{{- end }}
{{- end }}
{{- with .pod.env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The id of a model on a hub; empty for a folder. Takes the root. */}}
{{- define "stagemesh.hubId" -}}
{{- dig "hub" "id" "" .Values.model }}
{{- end }}

{{- define "stagemesh.mounts" -}}
- {name: settings, mountPath: /etc/stagemesh, readOnly: true}
- {name: tmp, mountPath: /tmp}
{{- if or .root.Values.model.volume .pod.modelVolume }}
- {name: model, mountPath: {{ .root.Values.model.mountPath | quote }}, readOnly: true}
{{- end }}
{{- if include "stagemesh.hubId" .root }}
- {name: hub-cache, mountPath: {{ .root.Values.model.hub.cache.mountPath | quote }}}
{{- end }}
{{- end }}

{{/* Takes also "config", the ConfigMap's name. */}}
{{- define "stagemesh.volumes" -}}
- name: settings
  configMap: {name: {{ .config }}}
- name: tmp
  emptyDir: {}
{{- with default .root.Values.model.volume .pod.modelVolume }}
- name: model
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if include "stagemesh.hubId" .root }}
- name: hub-cache
  {{- toYaml (coalesce .pod.cacheVolume .root.Values.model.hub.cache.volume (dict "emptyDir" dict)) | nindent 2 }}
{{- end }}
{{- end }}

{{/* A container may take startupTimeoutSeconds to come up; from then on its liveness counts. Takes also "probe". */}}
{{- define "stagemesh.startupProbe" -}}
{{ toYaml .probe }}
periodSeconds: 5
timeoutSeconds: 3
failureThreshold: {{ divf .root.Values.startupTimeoutSeconds 5 | ceil | int }}
{{- end }}
