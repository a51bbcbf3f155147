// SPDX-License-Identifier: Apache-2.0

// Command apiserver is etcd and kube-apiserver: the first argument says which.
package main

import (
	"fmt"
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"k8s.io/component-base/cli"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
)

// etcd allocates two segments of its log at the start; its own 64 MB are much for a tmpfs.
const segmentBytes = 8 << 20

func main() {
	which := ""
	if len(os.Args) > 1 {
		which = os.Args[1]
	}
	switch which {
	case "etcd":
		wal.SegmentSizeBytes = segmentBytes
		etcdmain.Main(os.Args[1:])
	case "kube-apiserver":
		os.Args = os.Args[1:]
		os.Exit(cli.Run(app.NewAPIServerCommand()))
	default:
		fmt.Fprintln(os.Stderr, "usage: apiserver etcd|kube-apiserver [FLAG…]")
		os.Exit(2)
	}
}
